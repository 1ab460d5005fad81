"""Local window attention: the tokens around a query and the first tokens of the sequence, exactly; nothing
else."""

from fastattn_compile.operators.window.config import WindowConfig
from fastattn_compile.operators.window.operator import WindowAttention

__all__ = ["WindowAttention", "WindowConfig"]
