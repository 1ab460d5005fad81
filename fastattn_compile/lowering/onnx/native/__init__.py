"""Kernels of our ONNX nodes for ONNX Runtime, in C++: the sources of ``kernels/cpu`` behind the runtime's C interface."""

# Types of the nodes that have a kernel; the others run as functions.
NODES = ("FMA", "Window", "BarnesHut", "TreeLeaf", "TreeCoarse")
