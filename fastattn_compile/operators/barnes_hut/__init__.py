"""Barnes-Hut attention: near tokens exactly, and of the far ones those that a tree code opens for the
query."""

from fastattn_compile.operators.barnes_hut.config import BarnesHutConfig
from fastattn_compile.operators.barnes_hut.operator import BarnesHutAttention

__all__ = ["BarnesHutAttention", "BarnesHutConfig"]
