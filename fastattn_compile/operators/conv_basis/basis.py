"""The conv basis as the paper defines it, for one head and O(n^2): the oracle of what the operator computes.

Definitions and algorithms of Conv-Basis (arXiv 2405.05219), sections 2 to 4 of the specification, one
statement a line. Column and size counts are the paper's (from 1) where a docstring says so, tensors are
indexed from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """A sum of sub-convolution matrices.

    Args:
        vectors: ``(k, n)``; of row ``r`` only the first ``sizes[r]`` entries matter, the rest are 0.
        sizes: ``m_r``, falling: term ``r`` fills the lower-right ``m_r x m_r`` block.
    """

    vectors: Tensor
    sizes: tuple[int, ...]

    def dense(self) -> Tensor:
        """``sum_r conv(b_r, m_r)``: ``(n, n)``, lower triangular."""
        n = self.vectors.shape[1]
        return sum(
            (sub_convolution(b, m) for b, m in zip(self.vectors, self.sizes)), self.vectors.new_zeros(n, n)
        )


@dataclass(frozen=True)
class Probe:
    """One step of the binary search; counts are from 1."""

    term: int
    low: int
    high: int
    column: int
    distance: float


def sub_convolution(vector: Tensor, size: int) -> Tensor:
    """``conv(a, m)``: the lower-triangular Toeplitz matrix of ``a[:m]`` in the lower-right block of zeros."""
    n = vector.shape[0]
    place = torch.arange(n)
    offset = place[:, None] - place
    inside = (offset >= 0) & (place >= n - size)
    return vector[offset.clamp(min=0)].masked_fill(~inside, 0)


def decompose(matrix: Tensor, tolerance: float = 0.0) -> Basis:
    """The unique smallest conv basis of a lower-triangular matrix (specification section 2).

    Args:
        matrix: ``(n, n)``; what stands above the diagonal is not read.
        tolerance: Columns that differ by no more than this from the last emitted one, entry by entry, copy
            it.
    """
    n = matrix.shape[0]
    last = matrix.new_zeros(n)
    vectors, sizes = [], []
    for j in range(n):
        column = matrix[j:, j]
        if bool(((column - last[: n - j]).abs() > tolerance).any()):
            term = torch.zeros_like(last)
            term[: n - j] = column - last[: n - j]
            vectors.append(term)
            sizes.append(n - j)
            last = last.clone()
            last[: n - j] = column
    return Basis(torch.stack(vectors) if vectors else matrix.new_zeros(0, n), tuple(sizes))


def recover(
    column: Callable[[int, int], Tensor], n: int, k: int, probe: int, delta: float, eps: float
) -> tuple[Basis, list[Probe]]:
    """RECOVER, as written: anchors by binary search on column prefixes (section 3).

    Args:
        column: ``column(j, length)`` gives the first ``length`` scores down column ``j``, counted from 1.
        n: Size of the matrix.
        k: Terms to look for.
        probe: ``T``, entries compared.
        delta: Separation of anchors.
        eps: Noise of an entry.

    Returns:
        The basis, of fewer terms when the search range is used up, and every step of the searches.
    """
    seen, total = torch.zeros(probe, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    start, limit = 0, n - probe + 1
    vectors, sizes, probes = [], [], []
    for term in range(1, k + 1):
        if term > 1 and start >= limit:
            break
        low, high = start + 1, limit
        while low < high:
            middle = (low + high) // 2
            distance = float((column(middle, probe) - seen).abs().sum())
            probes.append(Probe(term, low, high, middle, distance))
            if distance >= delta - 2 * probe * eps:
                high = middle
            else:
                low = middle + 1
        start = low
        size = n - start + 1
        vector = torch.zeros(n, dtype=torch.float64)
        vector[:size] = column(start, size) - total[:size]
        reach = min(probe, size)
        seen[:reach] += vector[:reach]
        total += vector
        vectors.append(vector)
        sizes.append(size)
    return Basis(torch.stack(vectors), tuple(sizes)), probes


def exponentiate(basis: Basis) -> Basis:
    """The basis of ``exp`` of a lower triangle, telescoped and corrected (specification section 4).

    A basis that leaves the first columns 0 gets a term of ones for them, since ``exp(0) = 1``. For oracles
    only: where neighbouring anchors differ much in size the differences cancel, which is why kernels use the
        segment form.
    """
    n = basis.vectors.shape[1]
    vectors, sizes = basis.vectors, basis.sizes
    if not sizes or sizes[0] < n:
        vectors = torch.cat([vectors.new_zeros(1, n), vectors])
        sizes = (n, *sizes)
    profiles = vectors.cumsum(0).exp()
    terms = torch.cat([profiles[:1], profiles[1:] - profiles[:-1]])
    inside = torch.arange(n) < torch.tensor(sizes)[:, None]
    return Basis(terms.masked_fill(~inside, 0), sizes)
