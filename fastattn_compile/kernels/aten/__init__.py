"""Kernels on ATen: every operator in torch's own operations, on any device, in the memory it promises."""
