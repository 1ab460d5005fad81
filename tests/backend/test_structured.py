"""Models whose scores carry structure beside the mask: packed documents, biases of the distance."""

from __future__ import annotations

import pytest
import torch
from backend.common import compiled, operators_used
from oracle import relative_error
from torch import nn

import fastattn_compile.backend as backend
from fastattn_compile.operators.base import AttentionInputs, AttentionOutput, Operator
from fastattn_compile.operators.exact.reference import exact_attention
from fastattn_compile.operators.observe import observing

FMA = {"operator": "fma", "block": 8, "rank": 2, "sinks": 2, "strict": True}
OPERATORS = {
    "fma": FMA,
    "window": {"operator": "window", "width": 12, "sinks": 2, "strict": True},
    "barnes_hut": {
        "operator": "barnes_hut", "block": 8, "leaf": 2, "fanout": 2, "open": 3, "beam": 4, "sinks": 2,
        "strict": True,
    },
    "conv_basis": {"operator": "conv_basis", "k": 5, "sinks": 2, "strict": True},
}  # fmt: skip


class Packed(nn.Module):
    """One attention over documents, told apart by their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        document = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
        place = torch.arange(x.shape[1])
        keep = (place[:, None] >= place) & (document[:, :, None] == document[:, None])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", OPERATORS)
def test_packed_documents_equal_each_document(name: str) -> None:
    model = Packed().double()
    lengths = [7, 61, 40]
    x = torch.randn(2, sum(lengths), 32, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    together = compiled(model, **OPERATORS[name])(x, positions)
    assert [d.softmax.mask for d in backend.decisions()] == ["causal & segments"]
    assert set(operators_used().values()) == {name}
    assert relative_error(together, model(x, positions)) > 1e-6
    start = 0
    for n in lengths:
        span = slice(start, start := start + n)
        alone = compiled(model, **OPERATORS[name])(x[:, span], positions[:, span])
        assert relative_error(together[:, span], alone) < 1e-12


def test_gradients_of_packed_documents_through_the_compiler() -> None:
    """Ahead-of-time autograd, and shapes that change: forward and backward as they are without a compiler."""
    model = Packed().double()
    results = []
    for compiler in ("eager", "aot_eager"):
        fast = compiled(model, dynamic=True, compiler=compiler, **FMA)
        for n in (50, 90):
            torch.manual_seed(n)
            x = torch.randn(1, n, 32, dtype=torch.float64, requires_grad=True)
            positions = torch.cat([torch.arange(n - 30), torch.arange(30)])[None]
            results.append(torch.autograd.grad(fast(x, positions).square().sum(), x)[0])
    for eager, traced in zip(results[:2], results[2:]):
        assert relative_error(traced, eager) < 1e-12


class Biased(nn.Module):
    """One attention whose scores get something by distance.

    Args:
        kind: ``alibi``: fixed slopes; ``symmetric``: to both sides; ``trained``: slopes that are learned;
            ``buckets``: a learned number for every bucket of distances; ``later``: a slope without a causal mask.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.into, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        slopes = 2.0 ** -torch.arange(1, 5)
        if kind == "trained":
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)
        self.table = nn.Embedding(8, 4)

    def bias(self, distance: torch.Tensor) -> torch.Tensor:
        if self.kind == "buckets":
            near = distance.abs().clamp(max=3) + 4 * (distance > 0)
            return self.table(near).permute(2, 0, 1)
        if self.kind == "symmetric":
            return -self.slopes[:, None, None] * distance.abs()
        return self.slopes[:, None, None] * distance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        distance = place - place[:, None]
        scores = q @ k.mT / 8**0.5 + self.bias(distance)
        if self.kind in ("alibi", "trained"):
            scores = scores.masked_fill(distance > 0, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


KINDS = {
    "alibi": ("causal", "alibi"),
    "symmetric": ("none", "alibi"),
    "trained": ("causal", "alibi"),
    "buckets": ("none", "bucketed"),
    "later": ("none", "bucketed"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_reaches_the_operator(kind: str, dynamic: bool) -> None:
    model = Biased(kind).double()
    fast = compiled(model, dynamic=dynamic, operator="exact", strict=True, compiler="aot_eager")
    for n in (20, 33):
        x = torch.randn(2, n, 32, dtype=torch.float64)
        results = []
        for function in (model, fast):
            out = function(x)
            results.append(
                (out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True))
            )
        for wanted, got in zip(*results):
            assert (wanted is None) == (got is None)
            assert wanted is None or relative_error(got, wanted) < 1e-12
    (made,) = {(d.softmax.mask, d.softmax.site.mask.bias, d.reason) for d in backend.decisions()}
    assert made == (*KINDS[kind], "named by the user")


@pytest.mark.parametrize("name", ["fma", "window", "conv_basis"])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_add_the_bias(kind: str, name: str) -> None:
    """What the operator is given is what the model adds, and what it gives is its definition of that."""
    model = Biased(kind).double()
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    seen: list[float] = []

    def observe(_: str, operator: Operator, inputs: AttentionInputs, output: AttentionOutput) -> None:
        seen.append(relative_error(output.out, operator.reference(inputs).out))
        seen.append(relative_error(exact_attention(inputs).out, merged(inputs)))

    def merged(inputs: AttentionInputs) -> torch.Tensor:
        place = torch.arange(90)
        scores = inputs.scale * inputs.query @ inputs.key.mT + model.bias(place - place[:, None])
        scores = scores.masked_fill(~inputs.visible(place), -torch.inf)
        return scores.softmax(-1) @ inputs.value

    with observing(observe), torch.no_grad():
        compiled(model, **OPERATORS[name])(x)
    assert len(seen) == 2 and max(seen) < 1e-12
    assert set(operators_used().values()) == {name}


def test_barnes_hut_refuses_a_bias_with_its_reason() -> None:
    compiled(Biased("alibi").double(), operator="barnes_hut")(torch.randn(1, 90, 32).double())
    (made,) = backend.decisions()
    assert made.operator == "exact" and "estimates scores from keys alone" in made.reason


def test_training_of_a_bias_through_fma() -> None:
    """Buckets and slopes that are learned get the gradients that the definition gives them."""
    for kind in ("buckets", "trained"):
        model = Biased(kind).double()
        x = torch.randn(1, 60, 32, dtype=torch.float64)
        learned = model.table.weight if kind == "buckets" else model.slopes
        fast = compiled(model, compiler="aot_eager", **FMA)
        (got,) = torch.autograd.grad(fast(x).square().sum(), learned)
        step = torch.zeros_like(learned)
        step.view(-1)[1] = 1e-5
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                learned += sign * step
                losses.append(fast(x).square().sum())
                learned -= sign * step
        assert float(got.view(-1)[1]) == pytest.approx(float(losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_a_bias_of_queries_that_continue_a_cache_keeps_the_site() -> None:
    """By distance from where? Only queries and keys at the same positions say so."""

    class Continues(Biased):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.into(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            q, n = q[:, :, -5:], x.shape[1]
            distance = torch.arange(n) - torch.arange(n - 5, n)[:, None]
            scores = (q @ k.mT + self.bias(distance)).masked_fill(distance > 0, -torch.inf)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model, x = Continues("buckets").double(), torch.randn(1, 20, 32).double()
    for name in ("exact", "window"):
        assert torch.equal(compiled(model, operator=name)(x), model(x))
        (made,) = backend.decisions()
        assert made.operator == "exact" and "dense" in made.reason


def test_a_bias_that_is_data_keeps_the_site() -> None:
    class Dense(Biased):
        def bias(self, distance: torch.Tensor) -> torch.Tensor:
            return torch.randn(4, *distance.shape).double()

    compiled(Dense("symmetric").double(), operator="exact")(torch.randn(1, 20, 32).double())
    (made,) = backend.decisions()
    assert made.operator == "exact" and "dense" in made.reason


transformers = pytest.importorskip("transformers")


class LastHidden(nn.Module):
    """A transformers model as a function of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def biased_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    configurations = {
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "use_cache": False},
        "Falcon": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "bias": True,
            "multi_query": False, "new_decoder_architecture": False, "use_cache": False,
        },
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=99, **configurations[name])
    model = getattr(transformers, "T5EncoderModel" if name == "T5" else f"{name}Model")(config)
    return LastHidden(model.eval().double())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bloom", "Mpt", "Falcon", "T5"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_biased_models_are_served_by_fma(name: str, dynamic: bool) -> None:
    model = biased_model(name)
    ids = torch.randint(99, (2, 100))
    seen: list[float] = []

    def observe(_: str, operator: Operator, inputs: AttentionInputs, output: AttentionOutput) -> None:
        assert inputs.spec().bias == ("bucketed" if name == "T5" else "alibi")
        seen.append(relative_error(output.out, operator.reference(inputs).out))

    with torch.no_grad(), observing(observe):
        exact = model(ids)
        # All tokens near: nothing is approximated. The models make their biases in float32.
        whole = compiled(model, dynamic=dynamic, operator="fma", block=64, strict=True)(ids)
        assert relative_error(whole, exact) < 1e-6
        fast = compiled(model, dynamic=dynamic, **FMA)(ids)
        assert set(operators_used().values()) == {"fma"}
        assert relative_error(fast, exact) > 1e-6
    assert len(seen) == 4 and max(seen) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bloom", "Mpt", "Falcon"])
@pytest.mark.parametrize("operator", ["exact", "fma", "window"])
def test_alibi_of_padded_batches(name: str, operator: str) -> None:
    """BLOOM and Falcon count positions over real tokens: left, right and between them, padding parts nothing.

    Every sequence gives what its real tokens give alone (with padding on the left, the models themselves give NaN).
    """
    model, ids = biased_model(name), torch.randint(99, (3, 60))
    real = torch.ones(3, 60, dtype=torch.int64)
    real[0, 45:], real[1, :9] = 0, 0
    if name != "Mpt":
        real[2, 20:31] = 0
    everything = {"exact": {}, "fma": {"block": 64}, "window": {"width": 64}}[operator]
    with torch.no_grad():
        wanted = [model(x[at.bool()][None])[0] for x, at in zip(ids, real)]
        got = compiled(model, operator=operator, strict=True, dynamic=True, **everything)(ids, real)
    for out, at, alone in zip(got, real, wanted):
        assert relative_error(out[at.bool()], alone) < 1e-6
    assert {d.softmax.site.mask.bias for d in backend.decisions()} == {"alibi"}


@pytest.mark.slow
def test_training_of_t5_through_fma() -> None:
    """The table of buckets is learned: its gradient is there, and near the exact one when all tokens are near."""
    model, ids = biased_model("T5"), torch.randint(99, (1, 40))
    table = model.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    grads = []
    for function in (model, compiled(model, operator="fma", block=32, strict=True, compiler="aot_eager")):
        (grad,) = torch.autograd.grad(function(ids).square().sum(), table)
        grads.append(grad)
    assert relative_error(grads[1], grads[0]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_of_a_model(attention: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=99, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel._from_config(config, attn_implementation=attention).eval().double()
    lengths = [61, 40]
    ids = torch.randint(99, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        together = compiled(model, **FMA)(input_ids=ids, position_ids=positions).last_hidden_state
        assert {d.softmax.mask for d in backend.decisions()} == {"causal & segments"}
        assert set(operators_used().values()) == {"fma"}
        start = 0
        for n in lengths:
            span = slice(start, start := start + n)
            alone = compiled(model, **FMA)(input_ids=ids[:, span]).last_hidden_state
            assert relative_error(together[:, span], alone) < 1e-10
