"""The masks of transformers models, as the finder meets them, against the tensors the models compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn_compile.passes import find as finder
from fastattn_compile.passes.functionalize import functionalize
from fastattn_compile.passes.fx_view import view
from fastattn_compile.passes.graph import GraphView, Node
from fastattn_compile.passes.mask_structure import MaskAnalysis, MaskTerm, verify

transformers = pytest.importorskip("transformers")

B, N, M = 2, 20, 12
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WIDE = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
NEO = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]], "window_size": 6, "intermediate_size": 32,
}  # fmt: skip
MODERN = {
    **WIDE, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip

# Model, configuration, and for each attention in order: mask, mask with padding, bias.
Site = tuple[str, str, str]
CAUSAL: Site = ("causal", "causal & key_padding", "none")
PLAIN: Site = ("none", "key_padding", "none")


def windowed(width: int) -> Site:
    return f"causal & window({width})", f"causal & window({width}) & key_padding", "none"


MODELS: dict[str, tuple[str, dict[str, Any], list[Site]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED, [CAUSAL] * 2),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 6}, [windowed(6)] * 2),
    "Gemma2": (
        "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}, [windowed(6), CAUSAL]
    ),
    "Bert": ("BertModel", WIDE, [PLAIN] * 2),
    "GPT2": ("GPT2LMHeadModel", GPT2, [CAUSAL] * 2),
    "GPTNeo": ("GPTNeoForCausalLM", NEO, [CAUSAL, windowed(6)]),
    "ModernBert": (
        "ModernBertModel", MODERN,
        [PLAIN, ("right(4) & left(4)", "right(4) & left(4) & key_padding", "none")],
    ),
    "T5": ("T5EncoderModel", T5, [("none", "key_padding", "bucketed")] * 2),
    "Bloom": (
        "BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        [("causal", "causal & key_padding", "alibi")] * 2,
    ),
}  # fmt: skip
NEVER_FUSED = {"GPTNeo", "Bloom", "Gemma2"}
CASES = [
    (name, implementation, padded)
    for name in MODELS
    for implementation in ("eager", "sdpa")
    for padded in (False, True)
    if implementation == "eager" or name not in NEVER_FUSED
]
QUICK = [("Llama", "eager", True), ("Llama", "sdpa", False)]


def _mask() -> torch.Tensor:
    mask = torch.ones(B, N, dtype=torch.int64)
    mask[0, 13:] = 0
    return mask


def _model(name: str, implementation: str) -> torch.nn.Module:
    cls, options, _ = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    config.use_cache = False
    torch.manual_seed(0)
    return getattr(transformers, cls)._from_config(config, attn_implementation=implementation).eval()


Answer = tuple[list[MaskTerm], MaskAnalysis, bool]


def _listen(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """What the finder will ask of the mask analysis, and the answers."""
    heard: list[Answer] = []
    asked: Callable[..., MaskAnalysis] = finder.recognise

    def recognise(terms: list[MaskTerm], lifter: Any, sizes: Any, causal: bool, *rest: Any) -> MaskAnalysis:
        analysis = asked(terms, lifter, sizes, causal, *rest)
        heard.append((list(terms), analysis, causal))
        return analysis

    monkeypatch.setattr(finder, "recognise", recognise)
    return heard


def _analysed(
    model: torch.nn.Module, dynamic: bool = False, **given: torch.Tensor
) -> tuple[torch.fx.GraphModule, list[Any], GraphView]:
    """Runs the finder where a backend runs it: while the buffers of the model can be read."""
    found: list[tuple[torch.fx.GraphModule, list[Any], GraphView]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = view(gm, functionalize(gm))
        finder.find(graph)

        def run(*inputs: Any) -> Any:
            found.append((gm, list(inputs), graph))
            return gm.forward(*inputs)

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(**given)
    (single,) = found
    return single


class _Recorder(torch.fx.Interpreter):
    """Keeps the value of every node."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = result
        return result


def _values(gm: torch.fx.GraphModule, inputs: list[Any], graph: GraphView) -> dict[Node, torch.Tensor]:
    recorder = _Recorder(gm)
    recorder.seen = {}
    with torch.no_grad():
        recorder.run(*inputs)
    return {
        node: recorder.seen[node.origin]
        for node in graph.nodes
        if isinstance(recorder.seen.get(node.origin), torch.Tensor)
    }


def _check(expected: list[tuple[str, str]], answers: list[Answer], values: dict[Node, torch.Tensor]) -> None:
    assert [(str(a.structure), a.bias) for _, a, _ in answers] == expected, [a.reason for _, a, _ in answers]
    for terms, analysis, causal in answers:
        assert verify(analysis, terms, values, causal)


@pytest.mark.parametrize(
    ("name", "implementation", "padded"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_masks_of_models(
    name: str, implementation: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"attention_mask": _mask()} if padded else {}
    answers = _listen(monkeypatch)
    found = _analysed(_model(name, implementation), input_ids=torch.randint(5, 60, (B, N)), **given)
    expected = []
    for plain, with_padding, bias in MODELS[name][2]:
        expected.append((with_padding if padded else plain, bias))
    _check(expected, answers, _values(*found))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_symbolic_sizes_of_a_model(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = _listen(monkeypatch)
    ids = torch.randint(5, 60, (B, N))
    found = _analysed(_model("Mistral", implementation), dynamic=True, input_ids=ids, attention_mask=_mask())
    _check([("causal & window(6) & key_padding", "none")] * 2, answers, _values(*found))


@pytest.mark.slow
def test_packed_sequences_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    position = torch.tensor([[*range(7), *range(9), *range(4)]] * B)
    answers = _listen(monkeypatch)
    ids = torch.randint(5, 60, (B, N))
    found = _analysed(_model("Mistral", "sdpa"), input_ids=ids, position_ids=position)
    _check([("causal & window(6) & segments", "none")] * 2, answers, _values(*found))


def test_layers_share_one_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 8}, use_cache=False)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    answers = _listen(monkeypatch)
    _analysed(model, input_ids=torch.randint(5, 60, (B, N)))
    assert len(answers) == 8
    assert all(analysis is answers[0][1] for _, analysis, _ in answers)
