"""Real text without a download: the sources of Python's standard library, chosen by name.

They are at hand wherever Python is, a hundred thousand tokens of prose and code with long-range repetition.
Two lists that share no module: ``EVALUATION`` is what reports are measured on and nothing may be fitted to,
``CALIBRATION`` is free for fitting. The text differs between Python versions; reports carry a hash of the
tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from fastattn_compile.errors import FastAttentionError

EVALUATION = (
    "argparse", "typing", "inspect", "tarfile", "pathlib", "subprocess", "statistics", "difflib", "zipfile",
    "turtle", "doctest", "shutil",
)  # fmt: skip
CALIBRATION = (
    "logging", "threading", "optparse", "mailbox", "imaplib", "configparser", "smtplib", "tokenize",
    "pickletools", "fractions", "socket", "pydoc",
)  # fmt: skip


def stdlib_text(characters: int, modules: Sequence[str] = EVALUATION) -> str:
    """The sources of standard modules one after the other, cut to a length.

    Args:
        characters: How many characters; less when the modules hold less.
        modules: Names in order. A module that this Python does not have, or has without source, is passed
            over.

    Raises:
        FastAttentionError: None of the modules has a source here.
    """
    parts: list[str] = []
    held = 0
    for name in modules:
        source = _source(name)
        if source and held < characters:
            parts.append(source)
            held += len(source)
    if not parts:
        raise FastAttentionError(
            "this Python has no sources of its standard library to read text from; give a text file (--text)"
        )
    return "\n".join(parts)[:characters]


def _source(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
        get_source = getattr(spec.loader, "get_source", None) if spec else None
        return (get_source(name) if get_source else None) or ""
    except (ImportError, OSError, ValueError):
        return ""
