"""Errors of the backend as the user sees them: torch.compile would show each as ``BackendCompilerFailed``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch._dynamo.exc

from fastattn_compile.errors import FastAttentionError, InternalError


@contextmanager
def surfacing(stage: str) -> Iterator[None]:
    """Lets our own errors leave torch.compile as what they are, and explains any other error of ours.

    Args:
        stage: What is being done, for the text of an error nobody foresaw.

    Raises:
        FastAttentionError: Of the type that was raised inside, with its text; ``InternalError`` for anything else.
    """
    try:
        yield
    except FastAttentionError as error:
        raise surfaced(error) from error.__cause__
    except Exception as error:
        # Torch's own control flow (a restart of tracing, a guard on data) is not an error of ours.
        if type(error).__module__.startswith("torch."):
            raise
        text = (
            f"fastattn failed to {stage}: {type(error).__name__}: {error}. This is a bug of fastattn_compile, not of the "
            'model: please report it with the traceback above; until then backend="inductor" compiles the model as it is'
        )
        raise surfaced(InternalError(text)) from error


def surfaced(error: FastAttentionError) -> FastAttentionError:
    """The same error as a type that torch.compile hands to its caller unchanged."""
    kind: Any = type(error)
    made = _passing(kind)(str(error))
    made.__dict__.update(error.__dict__)
    passed: FastAttentionError = made.with_traceback(error.__traceback__)
    return passed


@cache
def _passing(kind: type[FastAttentionError]) -> Any:
    """A subclass of an error that Dynamo takes for one of its own and lets through."""
    base = getattr(torch._dynamo.exc, "ShortenTraceback", None)

    def init(self: Any, text: str) -> None:
        Exception.__init__(self, text)
        self.first_useful_frame = None

    names = {"__init__": init, "__module__": kind.__module__}
    return type(kind.__name__, (kind,) if base is None else (kind, base), names)
