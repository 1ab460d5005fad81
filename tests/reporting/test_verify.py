"""The probes find what is planted, and nothing where nothing is; the controls are what they say."""

import copy
import dataclasses
import math

import pytest
import torch
from retrofitting.tiny import language, tokens
from torch import nn

import fastattn_compile as fa
from fastattn_compile.errors import FastAttentionError, VerificationError
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput
from fastattn_compile.operators.fma.operator import FastMultipoleAttention
from fastattn_compile.operators.mask import CAUSAL, NO_MASK
from fastattn_compile.operators.registry import make_operator, operator_names
from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.intervals import bootstrap, interval, token_intervals
from fastattn_compile.reporting.metrics import compare_logits, probe_rows, sink_keys
from fastattn_compile.reporting.rows import near_and_far, score_chunks
from fastattn_compile.reporting.verify import cuts, model_influence, site_influence

OPTIONS = {"block": 8, "rank": 2, "sinks": 2}


def site(n=96, mask=CAUSAL, dtype=torch.float32, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, n, 8), (2, kv_heads, n, 8), (2, kv_heads, n, 6))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return AttentionInputs(2 * q, k, v, 8**-0.5, mask)


def evaluated(model, **settings):
    base = {"operator": "fma", "options": OPTIONS, "compiler": "eager", "repeats": 1, "rows": 16}
    return fa.evaluate(model, {"input_ids": tokens(n=400)}, **{**base, **settings})


APART = {
    "fma": make_operator("fma", block=8, sinks=2),
    "barnes_hut": make_operator("barnes_hut", block=8, sinks=2, leaf=4, open=2, beam=2, rest="pool"),
}


def test_operators_that_come_apart():
    assert {n for n in operator_names() if make_operator(n).comes_apart} == {"fma"}
    assert all(operator.comes_apart for operator in APART.values())


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("mask", [CAUSAL, NO_MASK], ids=["causal", "bidirectional"])
def test_halves_put_together_again_are_the_operator(name, mask):
    inputs = site(mask=mask, dtype=torch.float64)
    operator = APART[name]
    output = operator.forward(inputs)
    rows = torch.arange(96)
    ((_, scores),) = score_chunks(inputs, rows)
    met = operator.exact_keys(inputs, rows)
    near, far = near_and_far(inputs, scores, met, output, rows)
    share = (scores.masked_fill(~met, -math.inf).logsumexp(-1) - output.log_sum_exp).exp()[..., None]
    assert share.max() <= 1 + 1e-12
    assert (share < 0.9).double().mean() > 0.02  # there is a far field to speak of
    torch.testing.assert_close(share * near + (1 - share) * far, output.out, rtol=1e-9, atol=1e-9)
    # The near half is softmax over the keys met, from the dense definition.
    keys, values = (x.repeat_interleave(2, 1) for x in (inputs.key, inputs.value))
    weights = (inputs.scale * inputs.query @ keys.mT).masked_fill(~met, -math.inf).softmax(-1)
    torch.testing.assert_close(near, weights @ values)


def test_the_far_half_of_multipole_attention_is_attention_to_the_pooled_rows_alone():
    """By the definition: values of near keys are 0, values of far ones what they are, normalised by the far mass."""
    inputs = site(mask=NO_MASK, dtype=torch.float64, n=32, heads=2)
    operator = make_operator("fma", block=4, rank=2, sinks=0)
    rows = torch.arange(16, 20)
    met = operator.exact_keys(inputs, rows)
    output = operator.reference(inputs)
    ((_, scores),) = score_chunks(inputs, rows)
    _, far = near_and_far(inputs, scores, met, output, rows)

    def far_sum(value):
        """Unnormalised sum over pooled rows: the near keys, the same for all these queries, carry no value."""
        changed = value.masked_fill(met[0, 0].any(0)[:, None], 0)
        out = operator.reference(
            AttentionInputs(inputs.query, inputs.key, changed, inputs.scale, NO_MASK)
        ).out
        return out[:, :, rows]

    wanted = far_sum(inputs.value) / far_sum(torch.ones_like(inputs.value)).clamp(min=1e-12)
    torch.testing.assert_close(far, wanted, rtol=1e-8, atol=1e-10)


def test_a_dead_far_field_shows(monkeypatch):
    """An operator whose far half returns nonsense of the right size: near alone is better, far alone is as bad as can be."""
    alive = evaluated(language(), verify=True)
    assert set(alive.model.controls) == {"no_attention", "window", "near_only", "far_only"}
    forward = FastMultipoleAttention.forward

    def dead(self, inputs, parameters=()):
        output = forward(self, inputs, parameters)
        ((_, scores),) = score_chunks(inputs, torch.arange(inputs.query.shape[2]))
        met = self.exact_keys(inputs, torch.arange(inputs.query.shape[2]))
        near, far = near_and_far(inputs, scores, met, output, torch.arange(inputs.query.shape[2]))
        share = (scores.masked_fill(~met, -math.inf).logsumexp(-1) - output.log_sum_exp).exp()[..., None]
        out = (share * near - 4 * (1 - share) * far).to(output.out.dtype).contiguous()
        return AttentionOutput(out, output.log_sum_exp)

    monkeypatch.setattr(FastMultipoleAttention, "forward", dead)
    report = evaluated(language(), verify=True)
    controls = report.model.controls
    assert controls["near_only"] < report.model.kl < controls["far_only"]
    assert any(s.controls["near_only"] < s.own_error for s in report.sites)
    from fastattn_compile.reporting.verdict import verdict

    assert any("near field alone (the far field carries nothing here)" in line for line in verdict(report))


def test_end_to_end_controls_are_the_models_they_name():
    model = language()
    report = evaluated(model, verify=True)
    # With no attention every site gives the running mean of its values: built by hand.
    with torch.no_grad():
        x = model.embed(tokens(n=400))
        for layer in model.layers:
            v = layer.attention.qkv(layer.norm(x)).chunk(3, -1)[2]
            mean = v.cumsum(1) / torch.arange(1, 401)[:, None]
            x = x + layer.attention.out(mean)
        exact = model(tokens(n=400))["logits"]
        kl = float(compare_logits(exact, model.head(x)).kl.mean())
    assert report.model.controls["no_attention"] == pytest.approx(kl, rel=1e-3)
    assert Report.from_json(report.to_json()) == report
    assert report.checks["causal"] is True
    assert report.checks["causal_sites"] == 2


def test_other_operators_have_the_controls_that_apply():
    report = evaluated(language(), operator="window", options={"width": 16, "sinks": 2}, verify=True)
    assert set(report.model.controls) == {"no_attention", "window"}
    # A window is the window of as many keys.
    assert report.model.controls["window"] == pytest.approx(report.model.kl, rel=1e-3)


@pytest.mark.parametrize("name", ["fma", "barnes_hut", "window", "conv_basis"])
def test_causal_operators_pass_the_probe(name):
    operator = make_operator(name)
    if name in ("fma", "barnes_hut"):
        operator = make_operator(name, block=16)
    assert site_influence(operator, site(n=257), ()) < 1e-12


_plain_forward = FastMultipoleAttention.forward


def leak(self, inputs, parameters=()):
    """Adds a thousandth of the mean of all values to every output."""
    output = _plain_forward(self, inputs, parameters)
    mean = inputs.value.mean(2, keepdim=True).repeat_interleave(inputs.group, 1)
    return AttentionOutput((output.out + 1e-3 * mean).contiguous(), output.log_sum_exp)


def test_a_leak_is_found_and_its_site_named(monkeypatch):
    monkeypatch.setattr(FastMultipoleAttention, "forward", leak)
    assert site_influence(FastMultipoleAttention(), site(), ()) > 1e-6
    with pytest.raises(VerificationError, match=r"site layers\.\d\.attention is not causal"):
        evaluated(language(), verify=True)


def test_a_mask_lost_on_the_way_is_found_end_to_end(monkeypatch):
    """The site is causal in itself, and is given a mask that is not: what a wrong reading of a graph would do."""

    def unmasked(self, inputs, parameters=()):
        return _plain_forward(self, dataclasses.replace(inputs, mask=NO_MASK), parameters)

    monkeypatch.setattr(FastMultipoleAttention, "forward", unmasked)
    monkeypatch.setattr("fastattn_compile.reporting.verify.site_influence", lambda *_: 0.0)
    with pytest.raises(VerificationError, match="a mask was lost"):
        evaluated(language(), verify=True)


def test_a_model_that_looks_ahead_by_itself_is_not_blamed():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
            self.embed = nn.Embedding(23, 16)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.inner(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    report = evaluated(Encoder(), verify=True)
    assert report.checks["causal"] is None
    assert report.checks["causal_sites"] == 0
    assert report.model.controls["no_attention"] > 0
    low, high = report.model.intervals["hidden_cosine"]
    assert low <= report.model.hidden_cosine <= high


def test_the_model_probe_changes_ids_floats_and_nothing_else():
    seen = []

    def model(given):
        seen.append(given)
        return given["x"].cumsum(1) + given["input_ids"].cumsum(1)[..., None]

    inputs = {
        "x": torch.randn(1, 30, 4), "input_ids": torch.randint(0, 9, (1, 30)), "attention_mask": torch.ones(1, 30),
        "scale": 2.0,
    }  # fmt: skip
    assert model_influence(model, inputs, model(inputs)) == 0.0
    for given, cut in zip(seen[1:], cuts(30)):
        assert torch.equal(given["x"][:, :cut], inputs["x"][:, :cut])
        assert not torch.equal(given["x"][:, cut:], inputs["x"][:, cut:])
        assert not torch.equal(given["input_ids"], inputs["input_ids"])
        assert given["attention_mask"] is inputs["attention_mask"]
    # What looks ahead by a little is seen.
    ahead = model_influence(lambda g: model(g) + 1e-3 * g["x"].mean(1, keepdim=True), inputs, model(inputs))
    assert ahead > 1e-6
    assert model_influence(model, {"other": 3}, torch.zeros(1, 30, 2)) is None
    assert cuts(1) == [] and cuts(2) == [1]


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Autocorrelated numbers of known mean: about 95 % of the intervals hold it."""
    held = 0
    trials = 120
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        noise = torch.randn(1, 64 * 60 + 15, generator=generator, dtype=torch.float64)
        values = noise.unfold(1, 16, 1).mean(-1)  # neighbours share most of their noise
        draws = bootstrap({"x": values}, torch.ones_like(values, dtype=torch.bool), seed=trial)["x"]
        low, high = interval(draws)
        held += low <= 0 <= high
    # Binomial(120, 0.95): fewer than 105 has probability under 1e-3.
    assert held >= 105
    assert held < trials


def test_intervals_pair_the_two_models():
    """The same change on an easy and on a hard text: the texts' own difficulty does not widen the interval."""
    exact = torch.randn(1, 1280, 7)
    exact[:, 640:] *= 8
    labels = torch.randint(0, 7, (1, 1280))
    found = token_intervals(compare_logits(exact, 1.0001 * exact, labels))
    low, high = found["ppl_change"]
    assert -0.01 < low <= high < 0.01
    assert found["top1"] == [1.0, 1.0]
    assert found["kl"][0] > 0
    assert token_intervals(compare_logits(exact[:, :100], exact[:, :100])) == {}


def test_a_retrofit_is_compared_with_the_model_it_was_made_from():
    before = language()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.head.weight.mul_(1.5)
    same = evaluated(before, operator="exact", options={}, before=before)
    assert same.model.kl < 1e-9
    report = evaluated(after, operator="exact", options={}, before=before)
    with torch.no_grad():
        wanted = compare_logits(before(tokens(n=400))["logits"], after(tokens(n=400))["logits"])
    assert report.model.kl == pytest.approx(float(wanted.kl.mean()), rel=1e-3)
    assert report.model.intervals["kl"][0] > 0
    with pytest.raises(FastAttentionError, match="do not belong together"):
        evaluated(Narrow(), before=before)


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = language()

    def forward(self, input_ids):
        return {"logits": self.inner(input_ids)["logits"][..., :5]}


def test_probe_rows_has_halves_only_with_a_log_sum_exp():
    inputs, operator = site(), make_operator("fma", **OPTIONS)
    output = operator.forward(inputs)
    rows = torch.arange(0, 96, 7)
    assert set(probe_rows(inputs, rows, output.out, operator).controls) == {"no_attention", "window"}
    probe = probe_rows(inputs, rows, output.out, operator, (), output.log_sum_exp)
    assert set(probe.controls) == {"no_attention", "window", "near_only", "far_only"}
    assert sink_keys(inputs, 2).sum() == 2
