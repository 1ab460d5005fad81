"""The errors a user may meet. Each text says what was got, what was expected and what to do."""

from __future__ import annotations


class FastAttentionError(Exception):
    """Base of the errors of this package."""


class OptionError(FastAttentionError, ValueError):
    """A backend option or a command-line value is unknown or out of range."""


class UnsupportedSiteError(FastAttentionError):
    """A site cannot be served by the operator the user named, and ``strict`` was asked for."""


class PlanError(FastAttentionError, ValueError):
    """A plan file is malformed, or names sites or operators that do not exist."""


class CheckpointError(FastAttentionError, ValueError):
    """A saved folder is damaged, does not belong to the model it is loaded into, or would overwrite another's files."""


class ModelLoadError(FastAttentionError):
    """What was given does not load as a model."""


class ConversionError(FastAttentionError):
    """A converted model fails validation or costs more than it may; nothing was written."""


class VerificationError(FastAttentionError):
    """A replaced model fails a check that no error can excuse: what comes later changes what came before."""


class NumericError(FastAttentionError):
    """A site produced NaN or Inf, or a kernel disagrees with its reference."""


class InternalError(FastAttentionError):
    """Something failed that should not: a bug of this package."""
