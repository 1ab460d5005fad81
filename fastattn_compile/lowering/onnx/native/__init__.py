"""Kernels of our ONNX nodes for ONNX Runtime, in C++: the sources of ``kernels/cpu`` behind the runtime's C interface."""
