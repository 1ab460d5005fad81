"""Operators in ONNX: a node of our domain, and beside it the same computation in standard operators as its body.

A runtime that knows nothing of us inlines the body; one that has our native kernels runs those, from the same file.
"""
