"""An evaluation against numbers computed by hand from the model's own tensors."""

import dataclasses

import pytest
import torch
from torch import nn

from fastattn_compile.errors import NumericError, OptionError, UnsupportedSiteError
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.plans import Plan, PlannedSite
from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.evaluate import evaluate
from fastattn_compile.reporting.metrics import relative_error, sample_rows

OPTIONS = {"block": 16, "rank": 2, "sinks": 2}
N = 150


class Attention(nn.Module):
    def __init__(self, width=32, heads=4, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        with torch.no_grad():
            self.qkv.weight.mul_(4)

    def project(self, x):
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x):
        mixed = nn.functional.scaled_dot_product_attention(*self.project(x), is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Language(nn.Module):
    def __init__(self, layers=2, causal=True):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Attention(causal=causal) for _ in range(layers))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.dropout(x + layer(x))
        return {"logits": self.head(x)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def ids(batch=2, n=N):
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(1))


def run(model, inputs, **kwargs):
    settings = {
        "operator": "fma",
        "options": OPTIONS,
        "compiler": "eager",
        "repeats": 1,
        "rows": 16,
        **kwargs,
    }
    return evaluate(model, inputs, **settings)


def test_errors_are_those_computed_by_hand():
    model, tokens = Language(), ids()
    report = run(model, {"input_ids": tokens})
    assert [site.operator for site in report.sites] == ["fma", "fma"]

    model.eval()
    operator, rows = make_operator("fma", **OPTIONS), sample_rows(N, 16)
    with torch.no_grad():
        exact = replaced = model.embed(tokens)
        for layer, site in zip(model.layers, report.sites):
            q, k, v = layer.project(exact)
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            alone = operator.forward(AttentionInputs(q, k, v, 8**-0.5, CAUSAL)).out
            inside = operator.forward(AttentionInputs(*layer.project(replaced), 8**-0.5, CAUSAL)).out
            own = relative_error(alone, out)[:, :, rows]
            accumulated = relative_error(inside, out)[:, :, rows]
            assert site.own_error == pytest.approx(float(own.quantile(0.5)), rel=1e-3)
            assert site.own_error_p95 == pytest.approx(float(own.quantile(0.95)), rel=1e-3)
            assert site.accumulated_error == pytest.approx(float(accumulated.quantile(0.5)), rel=1e-3)
            exact = exact + layer.out(out.transpose(1, 2).flatten(2))
            replaced = replaced + layer.out(inside.transpose(1, 2).flatten(2))
        p, q = model.head(exact).log_softmax(-1), model.head(replaced).log_softmax(-1)
    assert report.model.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    nll = nn.functional.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert report.model.ppl == pytest.approx(float(nll.exp()), rel=1e-4)
    assert report.sites[1].accumulated_error > report.sites[0].accumulated_error * 0.5
    assert report.model.kl > 0


def test_the_document_is_complete_and_the_model_untouched():
    model = Language()
    model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stages = []
    report = run(
        model, {"input_ids": ids()}, context={"text": "random"}, progress=lambda *said: stages.append(said)
    )
    assert Report.from_json(report.to_json()) == report
    assert all(site.mass_recall is not None and 0 < site.mass_recall <= 1 for site in report.sites)
    assert all(
        set(site.controls) == {"no_attention", "window", "near_only", "far_only"} for site in report.sites
    )
    assert len(report.model.by_position) == 3
    assert report.cost.n == N
    assert min(report.cost.attention_ms, report.cost.attention_ms_exact, report.cost.total_ms) > 0
    assert report.cost.attention_baseline == "scaled_dot_product_attention"
    assert report.provenance["text"] == "random"
    assert any(done == 2 and total == 2 for _, done, total in stages)
    assert model.training and not model.layers[0].training
    assert not hasattr(model, "_orig_mod")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_operator_that_meets_every_key_costs_nothing():
    report = run(Language(), {"input_ids": ids()}, options={"block": 128, "rank": 2, "sinks": 2})
    for site in report.sites:
        assert site.own_error_p99 < 1e-5
        assert site.mass_recall == pytest.approx(1.0, abs=1e-5)
        assert site.controls["window"] < 1e-5
    assert report.model.kl < 1e-8
    assert report.model.top1 == 1.0


def test_a_site_tells_what_its_operator_knows_of_itself():
    model = Language()
    ids = torch.randint(50, (1, N), generator=torch.Generator().manual_seed(3))
    report = evaluate(
        model,
        {"input_ids": ids},
        operator="barnes_hut",
        options={"block": 8, "open": 3},
        compiler="eager",
        repeats=1,
    )
    for site in report.sites:
        assert 0 < site.diagnostics["unopened_mass"] < 1
    assert Report.from_json(report.to_json()) == report


def test_a_plan_serves_the_sites_it_names():
    model = Language()
    names = [site.name for site in run(model, {"input_ids": ids()}).sites]
    plan = Plan({names[1]: PlannedSite("fma", OPTIONS, "the test says so")})
    report = run(model, {"input_ids": ids()}, operator=None, options={}, plan=plan)
    first, second = report.sites
    assert (first.operator, first.own_error) == ("exact", 0.0)
    assert "plan" in first.reason
    assert (second.operator, second.reason) == ("fma", "the test says so")
    # Nothing below the second site was replaced: what accumulates there is its own error alone.
    assert second.accumulated_error == pytest.approx(second.own_error, rel=1e-4)


def test_without_logits_the_last_hidden_state_is_compared():
    report = run(Attention(causal=False), (torch.randn(1, N, 32),))
    assert report.model.kl is None
    assert 0 < report.model.hidden_error < 2
    assert -1 <= report.model.hidden_cosine <= 1


def test_perplexity_needs_causal_sites_or_labels():
    model = Language(causal=False)
    assert run(model, {"input_ids": ids()}).model.ppl is None
    labels = ids().roll(-1, 1)
    assert run(model, {"input_ids": ids()}, labels=labels).model.ppl is not None


def test_a_model_without_attention_has_no_sites():
    report = run(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),))
    assert report.sites == ()
    assert report.cost.attention_ms is None
    assert report.model.hidden_error == 0.0


def test_nan_stops_with_the_name_of_the_site():
    model = Language()
    with torch.no_grad():
        model.layers[1].qkv.bias[0] = torch.nan
    model.train()
    with pytest.raises(NumericError, match=r"layers.1.*its inputs already held them"):
        run(model, {"input_ids": ids()})
    assert model.training


def test_bad_options_and_strict():
    with pytest.raises(OptionError, match="blok"):
        run(Language(), {"input_ids": ids()}, options={"blok": 3})

    class Dropped(Attention):
        def forward(self, x):
            q, k, v = self.project(x)
            weights = nn.functional.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, training=True)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    report = run(Dropped(), (torch.randn(1, 40, 32),))
    assert [site.operator for site in report.sites] == ["exact"]
    assert "dropout" in report.sites[0].reason
    with pytest.raises(UnsupportedSiteError, match="dropout"):
        run(Dropped(), (torch.randn(1, 40, 32),), options={**OPTIONS, "strict": True})


def test_padding_counts_nowhere():
    model = Padded()
    tokens, real = ids(), torch.ones(2, N, dtype=torch.long)
    real[1, 100:] = 0
    report = run(model, {"input_ids": tokens, "attention_mask": real})
    assert [site.operator for site in report.sites] == ["fma"]
    assert report.model.tokens == N + 100
    changed = torch.where(real.bool(), tokens, (tokens + 1) % 50)
    again = run(model, {"input_ids": changed, "attention_mask": real})
    assert dataclasses.replace(again.model) == dataclasses.replace(report.model)


class Padded(nn.Module):
    """Bidirectional attention over the real tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(50, 32), Attention(), nn.Linear(32, 50)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        out = nn.functional.scaled_dot_product_attention(*self.attention.project(x), attn_mask=mask)
        return {"logits": self.head(x + self.attention.out(out.transpose(1, 2).flatten(2)))}
