"""Metrics against brute force: the whole n x n softmax, in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fastattn_compile.operators.base import AttentionInputs, Cost, OperatorConfig
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting import metrics
from fastattn_compile.reporting import rows as row_scores
from fastattn_compile.reporting.metrics import (
    Quantiles,
    compare_logits,
    cosine,
    counted_rows,
    equal_cost_window,
    probe_rows,
    relative_error,
    sample_rows,
    summarise,
    thirds,
)


@dataclass(frozen=True)
class BandConfig(OperatorConfig):
    keys: float = 8.0
    sinks: int = 0


class Band(ExactAttention):
    """Exact attention that claims to meet only the last few keys and the sinks."""

    name = "band"
    config_type = BandConfig

    def exact_keys(self, inputs, rows, parameters=()):
        keys = torch.arange(inputs.key.shape[2])
        place = rows[:, None] + (
            inputs.key.shape[2] - inputs.query.shape[2] if inputs.mask.end_aligned else 0
        )
        near = ((place - keys).abs() < self.config.keys) | (keys < self.config.sinks)
        return inputs.visible(rows) & near

    def cost(self, spec):
        return Cost(0.0, 0.0, self.config.keys)


def band(keys=8.0, sinks=0):
    return Band(BandConfig(keys=keys, sinks=sinks))


def make_inputs(mask="causal", batch=2, heads=4, kv_heads=2, n=37, m=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    m = m or n

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    structure = MaskStructure.parse(mask)
    padding = None
    if structure.key_padding:
        padding = torch.arange(m)[None] < torch.tensor([[m], [m - 9]])[:batch]
    return AttentionInputs(
        normal(batch, heads, n, 8),
        normal(batch, kv_heads, m, 8),
        normal(batch, kv_heads, m, 5),
        0.35,
        structure,
        padding,
    )


def brute_weights(inputs, allowed):
    """Softmax over all pairs, keys repeated over the heads that share them."""
    keys = inputs.key.repeat_interleave(inputs.group, 1)
    scores = torch.einsum("bhnd,bhmd->bhnm", inputs.query, keys) * inputs.scale
    return scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0)


def brute_out(inputs, weights):
    return torch.einsum("bhnm,bhme->bhne", weights, inputs.value.repeat_interleave(inputs.group, 1))


MASKS = ["causal", "none", "causal & window(9)", "causal & key_padding", "left(6) & right(3)", "chunk(8)"]


@pytest.mark.parametrize("mask", MASKS)
def test_probe_agrees_with_the_dense_softmax(mask, monkeypatch):
    inputs = make_inputs(mask)
    operator = band(keys=6.0, sinks=2)
    n = inputs.query.shape[2]
    rows = sample_rows(n, 11, seed=3)
    everything = torch.arange(n)
    seen = inputs.visible(everything).expand(2, 4, n, n)
    weights = brute_weights(inputs, seen)
    exact = brute_out(inputs, weights)
    out = exact + 0.1 * torch.randn(
        exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(9)
    )

    monkeypatch.setattr(
        row_scores, "_CHUNK_ELEMENTS", 2 * 4 * n * 3
    )  # three rows a chunk: 11 rows end in a ragged one
    probe = probe_rows(inputs, rows, out, operator)

    kept = counted_rows(inputs, rows).expand(2, 4, rows.numel())
    window = equal_cost_window(inputs, operator)
    near = window.visible(everything[:, None], everything[None], n, n) | (everything < 2)
    wanted = {
        "own_error": relative_error(out, exact),
        "mass_recall": (weights * operator.exact_keys(inputs, everything)).sum(-1),
        "no_attention": relative_error(
            brute_out(inputs, seen.double() / seen.sum(-1, keepdim=True).clamp(min=1)), exact
        ),
        "window": relative_error(brute_out(inputs, brute_weights(inputs, seen & near)), exact),
    }
    got = {"own_error": probe.own_error, "mass_recall": probe.mass_recall, **probe.controls}
    assert set(got) == set(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(got[name], values[:, :, rows][kept], rtol=1e-12, atol=1e-14)


def test_probe_of_exact_attention_is_without_error():
    inputs = make_inputs("causal & key_padding", dtype=torch.float32)
    exact = ExactAttention()
    rows = sample_rows(37, 16)
    probe = probe_rows(inputs, rows, exact.forward(inputs).out, exact)
    assert probe.own_error.max() < 2e-6
    torch.testing.assert_close(probe.mass_recall, torch.ones_like(probe.mass_recall))
    # A window that meets every key is exact attention too; the plain mean is not.
    assert probe.controls["window"].max() < 2e-6
    assert probe.controls["no_attention"].median() > 0.1


def test_padding_rows_and_blind_rows_do_not_count():
    inputs = make_inputs("causal & key_padding")
    rows = torch.arange(37)
    probe = probe_rows(inputs, rows, torch.zeros(2, 4, 37, 5), band())
    assert probe.own_error.numel() == 4 * (37 + 28)
    left_padded = replace(inputs, key_padding=inputs.key_padding.flip(1))
    probe = probe_rows(left_padded, rows, torch.zeros(2, 4, 37, 5), band())
    assert probe.own_error.numel() == 4 * (37 + 28)
    assert probe.own_error.isfinite().all()


def test_dense_bias_is_part_of_the_scores():
    inputs = make_inputs("none")
    bias = torch.randn(1, 4, 37, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    keys = inputs.key.repeat_interleave(2, 1)
    scores = torch.einsum("bhnd,bhmd->bhnm", inputs.query, keys) * inputs.scale + bias
    out = brute_out(inputs, scores.softmax(-1))
    probe = probe_rows(replace(inputs, bias=bias), sample_rows(37, 9), out, band())
    assert probe.own_error.max() < 1e-12


@pytest.mark.parametrize("mask", ["causal", "none", "causal & window(20)", "left(6) & right(3)", "right(2)"])
@pytest.mark.parametrize("keys", [1.0, 4.5, 13.0, 200.0])
@pytest.mark.parametrize("sinks", [0, 3])
def test_window_meets_as_many_keys_as_the_operator(mask, keys, sinks):
    inputs = make_inputs(mask, n=50)
    operator = band(keys=keys, sinks=sinks)
    every = torch.arange(50)

    def mean_keys(width):
        if inputs.mask.causal:
            structure = MaskStructure(left=width - 1, right=0)
        else:
            structure = MaskStructure(left=width // 2, right=(width - 1) // 2)
        near = structure.visible(every[:, None], every[None], 50, 50) | (every < sinks)
        return structure, float((near & inputs.visible(every)[0, 0]).sum(-1).double().mean())

    counts = [mean_keys(width) for width in range(1, 101)]
    enough = [structure for structure, count in counts if count >= keys]
    assert equal_cost_window(inputs, operator) == (enough[0] if enough else counts[-1][0])


def test_window_of_queries_that_continue_a_cache_stands_at_the_end():
    inputs = make_inputs("causal & end_aligned", n=10, m=40)
    window = equal_cost_window(inputs, band(keys=5.0))
    assert (window.left, window.right, window.end_aligned) == (4, 0, True)


def test_recall_counts_the_keys_that_learned_parameters_choose():
    """All keys in one leaf, or half of them: without the planes nobody knows which."""
    inputs = make_inputs("none", batch=1, heads=1, kv_heads=1)
    operator = make_operator("tf_attention", height=1)
    rows = torch.arange(37)
    recalls = []
    for offset in (-1e3, 0.0):
        plane = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
        plane[..., 0] = 1
        parameters = plane, torch.full((1, 1, 1), offset, dtype=torch.float64)
        out = operator.forward(inputs, parameters).out
        recalls.append(probe_rows(inputs, rows, out, operator, parameters).mass_recall)
    same_side = (inputs.query[0, 0, :, :1] > 0) == (inputs.key[0, 0, :, 0] > 0)
    assert recalls[0].min() > 1 - 1e-12
    torch.testing.assert_close(
        recalls[1], (brute_weights(inputs, torch.tensor(True))[0, 0] * same_side).sum(-1)
    )


def test_sampled_rows_cover_every_depth_and_depend_on_the_seed_alone():
    rows = sample_rows(1000, 64, seed=7)
    assert rows.numel() == 64
    assert (rows.diff() > 0).all()
    strata = torch.arange(65) * 1000 // 64
    assert ((rows >= strata[:-1]) & (rows < strata[1:])).all()
    assert torch.equal(rows, sample_rows(1000, 64, seed=7))
    assert not torch.equal(rows, sample_rows(1000, 64, seed=8))
    assert torch.equal(sample_rows(5, 64), torch.arange(5))
    with pytest.raises(ValueError, match="rows=0"):
        sample_rows(10, 0)


def test_relative_error_of_zero_against_zero_is_zero():
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    replaced = torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(replaced, exact).tolist() == [pytest.approx(0.2), 0.0, math.inf]


def test_quantiles_are_those_of_numpy():
    values = torch.rand(3, 67, generator=torch.Generator().manual_seed(0))
    found = Quantiles.of(values)
    wanted = torch.quantile(values.double().flatten(), torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
    assert (found.median, found.p95, found.p99) == pytest.approx(wanted.tolist(), rel=1e-12)
    assert Quantiles.of(torch.empty(0)) is None
    assert Quantiles.of(torch.tensor([1.0, math.inf, math.inf])).median == math.inf


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(2, 23, 50, generator=generator) * 3
    replaced = exact + torch.randn(2, 23, 50, generator=generator)
    labels = torch.randint(0, 50, (2, 23), generator=generator)
    labels[1, 10:14] = -100
    return exact, replaced, labels


def test_token_metrics_against_brute_force(logits, monkeypatch):
    exact, replaced, labels = logits
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 2 * 50 * 4)  # four positions a chunk
    summary = summarise(compare_logits(exact, replaced, labels))
    p, q = exact.double().log_softmax(-1), replaced.double().log_softmax(-1)
    assert summary.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert summary.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for log_probabilities, found in ((p, summary.ppl_exact), (q, summary.ppl)):
        loss = torch.nn.functional.cross_entropy(
            log_probabilities[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        assert found == pytest.approx(math.exp(loss), rel=1e-5)
    assert summary.tokens == 46


def test_equal_logits_have_no_divergence(logits):
    exact, _, _ = logits
    summary = summarise(compare_logits(exact, exact.clone()))
    assert (summary.kl, summary.top1, summary.ppl, summary.ppl_exact) == (0.0, 1.0, None, None)


def test_thirds_add_up_to_the_whole_and_padding_is_left_out(logits):
    exact, replaced, labels = logits
    tokens = compare_logits(exact, replaced, labels)
    real = torch.ones(2, 23, dtype=torch.bool)
    real[0, 15:] = False
    parts = [summarise(tokens, real, span) for span in thirds(23)]
    whole = summarise(tokens, real)
    assert sum(part.tokens for part in parts) == whole.tokens == 15 + 23
    assert sum(part.kl * part.tokens for part in parts) / whole.tokens == pytest.approx(whole.kl, rel=1e-12)
    # The last real token predicts a padding token, which is no label.
    cut = compare_logits(exact, replaced, labels.masked_fill(~real, -100))
    assert whole.ppl == pytest.approx(summarise(cut, real).ppl, rel=1e-12)
    assert summarise(tokens, torch.zeros_like(real)) is None


def test_thirds_cover_all_positions_once():
    for length in range(0, 20):
        spans = thirds(length)
        assert [i for span in spans for i in range(length)[span]] == list(range(length))


def test_mismatched_logits_are_refused(logits):
    exact, replaced, labels = logits
    with pytest.raises(ValueError, match=r"\(2, 23, 50\).*\(2, 22, 50\)"):
        compare_logits(exact, replaced[:, 1:])
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 23\)"):
        compare_logits(exact, replaced, labels[:, 1:])


def test_cosine():
    assert cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0]])).item() == pytest.approx(1.0)
    assert cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item() == 0.0
