"""Attention written by hand: found by what it computes, replaced at compile time, trained through.

Run it: python examples/own_attention.py
"""

import torch
from torch import Tensor, nn

import fastattn_compile as fa


class Block(nn.Module):
    """A causal transformer block whose attention calls no library function."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = self.project(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(b, n, e))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(64, 4) for _ in range(2)))
    x = torch.randn(1, 1000, 64)

    fa.scan(model, x).print()

    fast = torch.compile(
        model, backend="fastattn", options={"operator": "fma", "strict": True, "compiler": "aot_eager"}
    )
    fast(x).square().mean().backward()  # no n x n tensor forward or backward
    fa.report(fast).print()


if __name__ == "__main__":
    main()
