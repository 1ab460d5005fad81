"""Fast multipole attention: near tokens exactly, far ones through pooled rows of growing groups."""

from fastattn_compile.operators.fma.config import FmaConfig
from fastattn_compile.operators.fma.operator import FastMultipoleAttention

__all__ = ["FastMultipoleAttention", "FmaConfig"]
