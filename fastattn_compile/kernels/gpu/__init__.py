"""Kernels in Triton, for GPUs; the interpreter and the ahead-of-time compiler prove them without one."""
