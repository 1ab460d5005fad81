"""Conv-basis attention: scores as a few profiles slid down the diagonal, sums by fast Fourier transforms."""

from fastattn_compile.operators.conv_basis.config import ConvBasisConfig
from fastattn_compile.operators.conv_basis.operator import ConvBasisAttention

__all__ = ["ConvBasisAttention", "ConvBasisConfig"]
