"""The batches of a training, read again from the start when they end, and sought when a run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastattn_compile.errors import OptionError


class Batches:
    """Batches one after the other, without end where the source can be read again.

    Args:
        source: A list, a data loader, any iterable; an iterator is read once.

    Raises:
        OptionError: It holds no batch, or raises.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._iterator: Iterator[Any] = iter(source)
        self._once = self._iterator is source
        self._ahead: list[Any] = []
        self._read = 0
        self.peek()

    def peek(self) -> Any:
        """The next batch, which stays the next."""
        if not self._ahead:
            self._ahead.append(self._fetch())
        return self._ahead[0]

    def next(self) -> Any:
        """The next batch.

        Raises:
            OptionError: An iterator has ended, or the source raises.
        """
        batch = self.peek()
        self._ahead.clear()
        self._read += 1
        return batch

    def seek(self, count: int) -> None:
        """Goes to the batch after the first ``count``, from wherever this stands before it.

        Raises:
            OptionError: An iterator is past it, or ends before it.
        """
        if count < self._read:
            if self._once:
                raise OptionError(
                    "the data is an iterator and cannot be read again: give a list or a data loader"
                )
            self._iterator, self._read = iter(self._source), 0
            self._ahead.clear()
        self.seek_ahead(count - self._read)

    def seek_ahead(self, count: int) -> None:
        """Passes over some batches."""
        for _ in range(count):
            self.next()

    def _fetch(self) -> Any:
        try:
            for batch in self._iterator:
                return batch
            if not self._once:
                self._iterator = iter(self._source)
                for batch in self._iterator:
                    return batch
        except Exception as error:
            raise OptionError(
                f"the data raised {type(error).__name__} after {self._read} batches: {error}; "
                "what was reached is kept in the run's folder"
            ) from error
        raise OptionError(
            f"the data ended after {self._read} batches" if self._read else "the data holds no batch"
        )
