"""Tables and verdicts: what they say, that they fit, and that nothing but text goes to a file."""

import dataclasses
import io
import re
from types import SimpleNamespace

import pytest
import torch

from fastattn_compile.passes.site import Softmax
from fastattn_compile.reporting.document import CostReport, ModelReport, Report, SiteReport, SpanReport
from fastattn_compile.reporting.terminal import joined_names, print_report, print_scan
from fastattn_compile.reporting.verdict import verdict


def site(number, **changes):
    base = SiteReport(
        f"model.layers.{number}.self_attn", "fma", "named by the user", 0.2, 0.25, 0.93,
        {"no_attention": 0.8, "window": 0.3}, 163.4, 0.5, 0.7, 0.6, 0.8, 20.0, 60.0, {},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def report(sites, **changes):
    base = Report(
        tuple(sites),
        ModelReport(0.34, 0.78, 5.48, 7.57, (SpanReport(0, 1365, 0.2, 0.8, 6.0, 8.0),), 4096),
        CostReport(100.0, 310.0, 900.0, 1200.0, 4096, "scaled_dot_product_attention", "inductor", 3),
    )
    return dataclasses.replace(base, **changes)


def printed(function, *args, **kwargs):
    file = io.StringIO()
    function(*args, file=file, **kwargs)
    return file.getvalue()


def softmax(name, status="taken", reason="", **sizes):
    sizes = {"kind": "self", "mask": "causal", "heads": 9, "kv_heads": 3, "head_dim": 64, **sizes}
    return Softmax(name, status, reason, "model.py:1", **sizes)


def scan_of(*lines):
    counts = {
        status: sum(x.status == status for x in lines) for status in ("taken", "exact", "not_attention")
    }
    return SimpleNamespace(softmaxes=lines, counts=counts)


@pytest.fixture
def scan():
    layers = [softmax(f"model.layers.{i}.self_attn") for i in range(30)]
    refused = softmax(
        "model.cross[0]", "exact", "the attention weights are read by something else", kind="cross"
    )
    router = Softmax("model.router", "not_attention", "no product with values follows", "model.py:9")
    return scan_of(*layers, refused, router)


def test_scan_lists_every_softmax_when_asked(scan):
    text = printed(print_scan, scan, full=True)
    assert all(line.name in text for line in scan.softmaxes)
    assert "30 of 32 softmaxes can be replaced, 1 stay exact, 1 are not attention" in text
    assert "the attention weights are read by something else" in text.replace("\n", " ")


def test_scan_joins_layers_that_are_alike(scan):
    text = printed(print_scan, scan)
    assert "model.layers.{0..29}.self_attn (30)" in text
    assert "model.layers.7.self_attn" not in text
    assert "model.cross[0]" in text
    assert "model.router" in text


def test_scan_tells_masks_that_were_read_from_values():
    layers = [softmax(f"layers.{i}.attn", checked=i < 2) for i in range(4)]
    text = printed(print_scan, scan_of(*layers))
    assert re.search(r"layers\.\{0\.\.1\}\.attn \(2\).* causal \(checked\)", text)
    assert re.search(r"layers\.\{2\.\.3\}\.attn \(2\).* causal +9", text)
    assert "compared before every call" in text
    assert "checked" not in printed(print_scan, scan_of(*layers[2:]))


def test_report_tells_masks_that_broke():
    sites = [site(0, mask_broken=3), site(1, mask_broken=3), site(2)]
    text = printed(print_report, report(sites)).replace("\n", " ")
    assert "mask: model.layers.{0..1}.self_attn (2): other than read on 3 calls, which ran exact" in text
    assert "other than read" not in printed(print_report, report(sites[2:]))


def test_scan_of_nothing():
    assert "No softmax was found" in printed(print_scan, scan_of())


@pytest.mark.parametrize("full", [False, True])
def test_output_fits_and_holds_no_control_characters(scan, full):
    many = report([site(i, reason="a long reason " * 20, operator="exact") for i in range(60)])
    for text in (printed(print_scan, scan, full=full), printed(print_report, many, full=full)):
        assert max(map(len, text.splitlines())) <= 100
        assert "\x1b" not in text


def test_report_prints_the_numbers_of_the_document():
    text = printed(print_report, report([site(0), site(1, own_error=0.4321)]))
    for wanted in (
        "model.layers.1.self_attn",
        "0.432",
        "163",
        "3.00x",
        "0.34",
        "78.0 %",
        "+38.1 %",
        "3.10x",
        "1200.0 ms",
    ):
        assert wanted in text
    assert "positions 0 to 1364" in text


def test_long_reports_show_the_worst_sites_and_all_on_request():
    sites = [site(i, accumulated_error=i / 100) for i in range(60)]
    short = printed(print_report, report(sites))
    assert "12 of 60 sites" in short
    assert "layers.59." in short
    assert "layers.3." not in short
    full = printed(print_report, report(sites), full=True)
    assert all(s.name in full for s in sites)


def test_unmeasured_report_prints_without_numbers():
    bare = Report((SiteReport("a", "fma", "named by the user"), SiteReport("b", "exact", "dropout")))
    text = printed(print_report, bare)
    assert "exact: b: dropout" in text
    assert "nan" not in text.lower()
    assert "KL" not in text


def test_markup_in_names_and_reasons_is_printed_as_it_is():
    odd = Report((SiteReport("layers[bold]", "exact", "mask [red]x[/red]"),))
    text = printed(print_report, odd)
    assert "layers[bold]" in text
    assert "[red]x[/red]" in text


def test_verdict_says_loss_and_gain_plainly():
    said = " ".join(verdict(report([site(0), site(1, operator="exact", controls={})])))
    assert "1 of 2 softmax attentions were replaced" in said
    assert "The loss is heavy: KL 0.34" in said
    assert "perplexity 5.48 to 7.57 (+38 %)" in said
    assert (
        "Attention 3.10x faster, the whole model 1.33x faster, both lowered by inductor at n = 4096" in said
    )
    assert "closer to exact than a local window" in said


def test_verdict_names_a_useless_far_field_and_a_slow_down():
    slower = CostReport(300.0, 100.0, 2000.0, 1000.0, 512)
    said = " ".join(verdict(report([site(0, controls={"window": 0.1}), site(1)], cost=slower)))
    assert "At 1 of 2 replaced sites a local window of as many keys is at least as close" in said
    assert "Attention 3.00x slower, the whole model 2.00x slower at n = 512" in said


@pytest.mark.parametrize(
    ("kl", "words"), [(0.001, "nearly as before"), (0.05, "small but visible"), (0.5, "The loss is heavy")]
)
def test_words_follow_the_divergence(kl, words):
    assert words in " ".join(verdict(report([site(0)], model=ModelReport(kl=kl))))


def test_verdict_without_sites_or_replacements():
    assert "nothing to replace" in verdict(Report(()))[0]
    assert "All 1 softmax attentions stayed exact" in verdict(Report((SiteReport("a", "exact"),)))[0]


def test_names_with_several_numbers_are_joined():
    assert joined_names(["a.0.b.1", "a.1.b.3"]) == "a.{0..1}.b.{1..3} (2)"
    assert joined_names(["a.5"]) == "a.5"
    assert joined_names(["a", "a"]) == "a (2)"


def test_no_change_has_no_minus_sign_and_eager_is_no_compiler():
    same = ModelReport(1e-9, 1.0, 98.5, 98.4999)
    said = " ".join(
        verdict(report([site(0)], model=same, cost=CostReport(1.0, 2.0, 3.0, 4.0, 64, compiler="eager")))
    )
    assert "98.5 to 98.5 (+0 %)" in said
    assert "both run without a compiler at n = 64" in said


def test_the_package_is_the_function():
    import fastattn_compile as fa
    from fastattn_compile.reporting.document import ReportError

    with pytest.raises(ReportError, match="run it once"):
        fa.report(torch.nn.Linear(2, 2))


def test_operators_tell_of_themselves_in_one_line():
    sites = tuple(
        SiteReport(f"layers.{i}", "barnes_hut", own_error=0.1, diagnostics={"unopened_mass": 0.02 * i})
        for i in range(3)
    )
    text = printed(print_report, Report(sites))
    assert "barnes_hut: unopened mass 0.0200 in the mean of its sites, most 0.0400 (layers.2)" in text
