"""Exact softmax attention: the fallback, and the measure of every other operator."""

from fastattn_compile.operators.exact.config import ExactConfig
from fastattn_compile.operators.exact.operator import ExactAttention

__all__ = ["ExactAttention", "ExactConfig"]
