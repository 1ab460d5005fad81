"""Different operators for the heads of one site, each head by the one that serves it best.

Ours, no paper: how much of a head's softmax mass lies far away differs within a layer (0.06 to 0.58 on SmolLM2-135M,
specs/barnes_hut.md), so that one budget for all heads is too much for some and too little for others.
"""

from fastattn_compile.operators.per_head.config import PerHeadConfig
from fastattn_compile.operators.per_head.operator import PerHeadAttention

__all__ = ["PerHeadAttention", "PerHeadConfig"]
