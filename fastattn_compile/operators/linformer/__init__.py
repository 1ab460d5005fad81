"""Linformer: keys and values projected along the sequence to a fixed number of learned rows.

Source: Wang, Li, Khabsa, Fang, Ma, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768
(2020). A baseline: the projections belong to positions, so it serves bidirectional sites of a bounded length
alone.
"""

from fastattn_compile.operators.linformer.config import LinformerConfig
from fastattn_compile.operators.linformer.operator import LinformerAttention

__all__ = ["LinformerAttention", "LinformerConfig"]
