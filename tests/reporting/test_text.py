"""The text: deterministic, disjoint lists, clear refusal."""

import sys

import pytest

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.reporting.text import CALIBRATION, EVALUATION, stdlib_text


def test_lists_share_no_module():
    assert not set(EVALUATION) & set(CALIBRATION)
    assert len(set(EVALUATION)) == len(EVALUATION)


@pytest.mark.parametrize("modules", [EVALUATION, CALIBRATION])
def test_text_is_long_and_the_same_twice(modules):
    assert len(stdlib_text(400_000, modules)) == 400_000
    assert stdlib_text(1000, modules) == stdlib_text(5000, modules)[:1000]


def test_no_module_is_imported_for_its_text():
    sys.modules.pop("turtle", None)
    assert "Turtle" in stdlib_text(10**6, ["turtle"])
    assert "turtle" not in sys.modules


def test_modules_without_source_are_passed_over():
    assert stdlib_text(10, ["sys", "no_such_module_here", "argparse"]) == stdlib_text(10, ["argparse"])
    with pytest.raises(FastAttentionError, match="--text"):
        stdlib_text(10, ["sys"])
