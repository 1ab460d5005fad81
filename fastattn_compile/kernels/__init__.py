"""Tensors in, tensors out. Nothing here knows the rest of the package."""
