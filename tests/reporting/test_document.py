"""The report document: contract keys, round trip, no NaN, refusals."""

import json
import math

import pytest

from fastattn_compile.errors import FastAttentionError
from fastattn_compile.reporting.document import (
    CostReport,
    ModelReport,
    Report,
    ReportError,
    SiteReport,
    SpanReport,
)

FULL = Report(
    sites=(
        SiteReport(
            "layers.0.attn", "fma", "named by the user", 0.02, 0.03, 0.97,
            {"no_attention": 0.8, "window": 0.01}, 163.5,
            0.05, 0.09, 0.07, 0.11, 1.5, 4.5, {"block": 64, "rank": 4, "version": 1},
        ),
        SiteReport("layers.1.attn", "exact", "the mask is not understood", own_error=0.0),
    ),
    model=ModelReport(0.3, 0.78, 5.48, 7.57, (SpanReport(0, 10, 0.1, 0.9, 5.0, 5.5),), 30),
    cost=CostReport(10.0, 30.0, 100.0, 120.0, 4096, "scaled_dot_product_attention", "inductor", 3),
    provenance={"seed": 0, "versions": {"torch": "2.13.0"}},
)  # fmt: skip


def test_contract_keys_are_there():
    document = FULL.to_json()
    assert document["schema"] == "fastattn.report/1"
    site = {
        "name",
        "operator",
        "reason",
        "own_error",
        "accumulated_error",
        "mass_recall",
        "controls",
        "keys_per_query",
    }
    for entry in document["sites"]:
        assert site <= set(entry)
    assert {"kl", "top1", "ppl_exact", "ppl", "by_position"} <= set(document["model"])
    assert {"attention_ms", "attention_ms_exact", "total_ms", "total_ms_exact", "n"} <= set(document["cost"])
    empty = Report(()).to_json()
    assert {key: set(empty[key]) for key in ("model", "cost")} == {
        key: set(document[key]) for key in ("model", "cost")
    }


def test_round_trip_through_a_file(tmp_path):
    FULL.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == FULL
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_keys_of_later_writers_are_ignored():
    document = FULL.to_json()
    document["extra"] = document["model"]["extra"] = document["sites"][0]["extra"] = 1
    document["model"]["by_position"][0]["extra"] = document["cost"]["extra"] = 1
    assert Report.from_json(document) == FULL


def test_numbers_that_are_not_finite_become_null():
    report = Report(
        (SiteReport("a", "fma", own_error=math.nan, controls={"window": math.inf}),),
        ModelReport(kl=-math.inf),
    )
    text = json.dumps(report.to_json(), allow_nan=False)
    read = Report.from_json(json.loads(text))
    assert read.sites[0].own_error is None
    assert read.sites[0].controls == {"window": None}
    assert read.model.kl is None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "got 'list'"),
        ({"schema": "fastattn.plan/1"}, "got 'fastattn.plan/1'"),
        ({"schema": "fastattn.report/1"}, "malformed report: 'model'"),
        ({"schema": "fastattn.report/1", "model": {}, "cost": {}, "sites": [{"name": "a"}]}, "operator"),
        ({"schema": "fastattn.report/1", "model": 3, "cost": {}, "sites": []}, "malformed report"),
        ({"schema": "fastattn.report/1", "model": {}, "cost": [], "sites": []}, "malformed report"),
        ({"schema": "fastattn.report/1", "model": {}, "cost": {}, "sites": 5}, "malformed report"),
    ],
)
def test_what_is_no_report_is_refused(document, message):
    with pytest.raises(ReportError, match=message):
        Report.from_json(document)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ReportError, match="No such file"):
        Report.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"\xff{")
    with pytest.raises(FastAttentionError, match="is not JSON"):
        Report.load(tmp_path / "bad.json")
