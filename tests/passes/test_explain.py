"""What is shown of how a softmax was read."""

from __future__ import annotations

import pytest
import spellings
import torch

import fastattn_compile as fa
from fastattn_compile.errors import OptionError


def explained(fn):
    found = fa.scan(fn, *(torch.randn(2, 4, 40, 16) for _ in range(3)))
    return found.explain(found.softmaxes[0].name)


@pytest.mark.parametrize("name", spellings.POSITIVE)
def test_the_way_from_queries_to_output(name: str) -> None:
    steps = explained(spellings.POSITIVE[name][0]).steps
    roles = [step.role for step in steps]
    ends = ("attention",) if "attention" in roles else ("softmax", "output")
    for role in ("queries", "keys", "values", *ends):
        assert roles.count(role) == 1, (role, roles)
    assert roles[-1] == ends[-1]
    assert all("spellings.py:" in step.source for step in steps if step.kind not in ("input", "constant"))


def test_a_mask_stands_beside() -> None:
    steps = explained(spellings.POSITIVE["causal_additive"][0]).steps
    assert [(step.kind, step.shape) for step in steps if step.role == "beside"] == [("triu", "(40, 40)")]


@pytest.mark.parametrize("name", ["mixture_of_experts", "classifier", "slot_attention"])
def test_a_refusal_shows_the_way_back_to_where_it_ended(name: str) -> None:
    explanation = explained(spellings.NEGATIVE[name])
    assert explanation.steps[-1].role == "softmax" and len(explanation.steps) > 1
    assert explanation.operators == {}
    if "they come from" in explanation.softmax.reason:
        assert explanation.steps[0].source in explanation.softmax.reason


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match="nearest names are"):
        fa.scan(spellings.POSITIVE["at_mul"][0], *(torch.randn(2, 4, 40, 16) for _ in range(3))).explain("x")


def test_a_model_with_a_graph_break_is_scanned_at_any_number_of_sizes() -> None:
    """Dynamo compiles what follows a break eight times in a process, and then runs it as it is."""

    def broken(q, k, v):
        torch._dynamo.graph_break()
        return spellings.POSITIVE["at_mul"][0](q, k, v)

    for n in range(20, 30):
        assert len(fa.scan(broken, *torch.randn(3, 1, 2, n, 8)).softmaxes) == 1, n
