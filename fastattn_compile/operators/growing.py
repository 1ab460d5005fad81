"""Rows that a decoder adds one by one, in storage that doubles."""

from __future__ import annotations

from torch import Tensor


class GrowingRows:
    """A tensor that grows at the end of one dimension: adding a row moves nothing most of the time.

    Args:
        dim: The dimension, counted from the front.
        rows: What it begins with; may be given later.
    """

    def __init__(self, dim: int, rows: Tensor | None = None) -> None:
        self.dim = dim
        self.length = 0 if rows is None else rows.shape[dim]
        self._store = rows

    def append(self, rows: Tensor) -> None:
        """Adds rows at the end; all other dimensions are those of the rows before.

        Raises:
            ValueError: The type is another.
        """
        if self._store is not None and rows.dtype != self._store.dtype:
            raise ValueError(
                f"the prompt's rows are {self._store.dtype}, those of this token are {rows.dtype}"
            )
        length = self.length + rows.shape[self.dim]
        if self._store is None or self._store.shape[self.dim] < length:
            shape = list(rows.shape)
            shape[self.dim] = 2 * length
            store = (rows if self._store is None else self._store).new_zeros(shape)
            if self._store is not None:
                store.narrow(self.dim, 0, self.length).copy_(self.rows)
            self._store = store
        # Rows that were given at the start are the caller's: they are full, so the first to be added moves them.
        self._store.narrow(self.dim, self.length, rows.shape[self.dim]).copy_(rows)
        self.length = length

    @property
    def rows(self) -> Tensor:
        """All of them.

        Raises:
            ValueError: There are none yet.
        """
        if self._store is None:
            raise ValueError("the decoder holds no rows; call prefill or step first")
        return self._store.narrow(self.dim, 0, self.length)
