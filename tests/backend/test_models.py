"""Real model code: torch.nn's own attention modules and transformers, in every mode they run in."""

from __future__ import annotations

import pytest
import torch
from backend.common import compiled, operators_used
from oracle import assert_as_good_as
from torch import nn

import fastattn_compile as fa
import fastattn_compile.backend as backend

N, DIM, HEADS = 48, 32, 4


def causal_bias(n: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(n)


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True, **options)


def attention_module(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options})


class Attends(nn.Module):
    """Self-attention through nn.MultiheadAttention, as it is usually called."""

    def __init__(self, **call) -> None:
        super().__init__()
        self.attention, self.call = attention_module(), call

    def forward(self, x, padding=None):
        return self.attention(x, x, x, key_padding_mask=padding, **self.call)[0]


def agrees(
    model: nn.Module, *inputs, sites: int, mask: str, names: list[str] | None = None, **options
) -> None:
    """Rewritten with exact attention, a model gives what it gave; all its sites are taken."""
    import copy

    oracle = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted, formula = (
            oracle(*(x.double() if x.is_floating_point() else x for x in inputs)),
            model(*inputs),
        )
        out = compiled(model, operator="exact", strict=True, **options)(*inputs)
    assert_as_good_as(out, oracle=wanted, formula=formula)
    made = backend.decisions()
    assert [d.softmax.status for d in made] == ["taken"] * sites, [d.reason for d in made]
    assert {d.softmax.mask for d in made} == {mask}
    if names is not None:
        assert [d.name for d in made] == names


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
class TestTorchModules:
    def test_multihead_attention(self, training: bool) -> None:
        model = Attends(need_weights=False).train(training)
        agrees(model, torch.randn(2, N, DIM), sites=1, mask="none", names=["attention"])

    def test_multihead_attention_causal(self, training: bool) -> None:
        model = Attends(need_weights=False, attn_mask=causal_bias(N), is_causal=True).train(training)
        agrees(model, torch.randn(2, N, DIM), sites=1, mask="causal")

    def test_multihead_attention_weights_unused(self, training: bool) -> None:
        agrees(Attends(need_weights=True).train(training), torch.randn(2, N, DIM), sites=1, mask="none")

    def test_multihead_attention_padding(self, training: bool) -> None:
        padding = torch.zeros(2, N, dtype=torch.bool)
        padding[0, 40:] = True
        model = Attends(need_weights=False).train(training)
        agrees(model, torch.randn(2, N, DIM), padding, sites=1, mask="key_padding")

    def test_returned_weights_keep_the_site(self, training: bool) -> None:
        class Returns(Attends):
            def forward(self, x):
                return self.attention(x, x, x)

        (line,) = fa.scan(Returns().train(training), torch.randn(2, N, DIM)).softmaxes
        assert line.status == "exact" and "weights" in line.reason

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_encoder_layer(self, training: bool, norm_first: bool) -> None:
        model = encoder_layer(norm_first=norm_first).train(training)
        agrees(model, torch.randn(2, N, DIM), sites=1, mask="none")

    def test_encoder(self, training: bool) -> None:
        model = nn.TransformerEncoder(encoder_layer(), 3, enable_nested_tensor=False).train(training)
        agrees(model, torch.randn(2, N, DIM), sites=3, mask="none")

    def test_dropout_on_the_weights_keeps_the_site(self, training: bool) -> None:
        model = nn.TransformerEncoderLayer(DIM, HEADS, batch_first=True).train(training)
        (line,) = fa.scan(model, torch.randn(2, N, DIM)).softmaxes
        assert line.status == ("exact" if training else "taken")
        assert not training or "dropout" in line.reason


transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


def tiny(kind: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = {
        "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False),
        "mistral": lambda: transformers.MistralConfig(
            **SIZES, num_key_value_heads=2, sliding_window=16, use_cache=False
        ),
        "bert": lambda: transformers.BertConfig(**SIZES),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=99, use_cache=False
        ),
    }[kind]()
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    return model


class Hidden(nn.Module):
    """A transformers model as a function of tensors: its last hidden state, padding tokens cut off by a weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        out = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return out if mask is None else out * mask[..., None]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "mask", "first"),
    [
        ("llama", "causal", "model.layers.0.self_attn"),
        ("mistral", "causal & window(16)", "model.layers.0.self_attn"),
        ("bert", "none", "model.encoder.layer.0.attention.self"),
        ("gpt2", "causal", "model.h.0.attn"),
    ],
)
def test_transformers(kind: str, mask: str, first: str, attention: str, padded: bool) -> None:
    model = Hidden(tiny(kind, attention))
    inputs = [torch.randint(99, (2, N))]
    if padded:
        real = torch.ones(2, N, dtype=torch.long)
        real[0, 41:] = 0
        inputs.append(real)
        mask = "key_padding" if mask == "none" else f"{mask} & key_padding"
    agrees(model, *inputs, sites=2, mask=mask)
    assert backend.decisions()[0].name == first


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_with_fma_and_dynamic_length(attention: str) -> None:
    model = Hidden(tiny("llama", attention))
    fast = compiled(model, dynamic=True, operator="fma", block=8, rank=2, strict=True)
    with torch.no_grad():
        for n in (40, 64, 100):
            ids = torch.randint(99, (1, n))
            out, exact = fast(ids), model(ids)
            assert out.shape == exact.shape and not torch.equal(out, exact)
            # A causal operator: what comes later does not change what came before.
            changed = ids.clone()
            changed[0, n // 2 :] = (changed[0, n // 2 :] + 1) % 99
            torch.testing.assert_close(fast(changed)[:, : n // 2], out[:, : n // 2])
    assert set(operators_used().values()) == {"fma"}
    assert len(backend.records()) == 1
