"""Kernels in C++ for CPUs, built at first use by the compiler that Inductor calls and kept in its cache.

The sources know nothing of torch: pointers, sizes and strides go in, so that they build in seconds and serve other runtimes.
"""
