"""A few models of the zoo, judged by the harness that judges all of it: ``benchmarks/find.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import find
from zoo import models

MODELS = models()
PICKED = (
    "bert", "deberta_v2", "modernbert", "openai_gpt", "gpt_neo", "gpt_oss", "gemma2", "deepseek_v3_mla", "t5",
    "whisper", "swinv2", "levit", "mixtral", "fnet", "poolformer",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PICKED)
def test_models(name: str, training: bool) -> None:
    entry = MODELS[name]
    row = find.measure(entry, "eager", entry.masked is not None, training, torch.float32, inductor=False)
    assert (row["missed"], row["false_positives"]) == (0, 0), row
    assert row["masks"] == row["masks_expected"], row
    assert row["agrees"], row


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith(("by hand", "negative", "nn."))])
def test_written_by_hand(name: str) -> None:
    row = find.measure(MODELS[name], "library", False, False, torch.float32, inductor=False)
    assert (row["missed"], row["false_positives"], row["masks"]) == (0, 0, row["masks_expected"]), row
    assert row["agrees"], row


def test_no_name_is_taken_twice_and_every_site_is_expected_somewhere() -> None:
    for entry in MODELS.values():
        for padded in (False, True) if entry.masked is not None else (False,):
            if not entry.untraceable:
                assert sum(entry.expected(padded).values()) == entry.sites - entry.kept, entry.name
