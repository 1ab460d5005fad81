"""``attn_implementation="fastattn"``: masks, routes, names and reports, with and without compilation."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch

import fastattn_compile as fa
import fastattn_compile.backend as backend
from fastattn_compile.errors import OptionError, PlanError, UnsupportedSiteError
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.observe import observing

transformers = pytest.importorskip("transformers")

from integrations.models import build, causal_lm, inputs_of  # noqa: E402
from oracle import assert_as_good_as  # noqa: E402
from transformers import masking_utils  # noqa: E402

from fastattn_compile.integrations.hugging_face.mask import StructuredMask, structured_mask  # noqa: E402

LENGTH = 48
FMA = {"operator": "fma", "block": 8, "rank": 2}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    backend.reset()
    fa.register_transformers()
    with torch.no_grad():
        yield


def hidden(model, given) -> torch.Tensor:
    out = model(**given).last_hidden_state
    mask = given.get("attention_mask")
    return out if mask is None else out.masked_fill(~mask[..., None].bool(), 0)


def served(model) -> dict[str, str]:
    """Site to operator, by the report."""
    return {site.name: site.operator for site in fa.report(model).sites}


def told(model) -> dict[str, tuple]:
    """What was decided of each site, and what was found of it."""
    return {
        d.name: (d.operator, d.options, d.softmax.mask, d.softmax.kind, d.softmax.heads, d.softmax.kv_heads)
        for d in backend.decisions(model)
    }


class TestMask:
    """The structure is the mask: evaluated, it is the tensor that the sdpa implementation gets."""

    FUNCTIONS: ClassVar = {
        "causal": masking_utils.causal_mask_function,
        "none": masking_utils.bidirectional_mask_function,
        "causal & window(7)": masking_utils.sliding_window_causal_mask_function(7),
        "right(7) & left(7)": masking_utils.sliding_window_bidirectional_mask_function(7),
        "causal & chunk(8)": masking_utils.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)),
        "causal & segments": masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(
                masking_utils.causal_mask_function, (torch.arange(40) % 13).expand(2, -1)
            ),
            masking_utils.packed_sequence_mask_function((torch.arange(40) // 13).expand(2, -1)),
        ),
    }

    @staticmethod
    def dense(**given) -> torch.Tensor:
        return masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("text", FUNCTIONS)
    def test_read(self, text: str, padded: bool) -> None:
        real = torch.ones(2, 40, dtype=torch.bool)
        real[0, :5] = False
        given = {
            "batch_size": 2, "q_length": 40, "kv_length": 40, "mask_function": self.FUNCTIONS[text],
            "attention_mask": real if padded else None,
        }  # fmt: skip
        mask = structured_mask(**given)
        assert isinstance(mask, StructuredMask)
        assert mask.structure == replace(MaskStructure.parse(text), key_padding=padded)
        wanted = self.dense(**given)
        assert torch.equal(mask.dense(torch.device("cpu")).expand_as(wanted), wanted)

    @pytest.mark.parametrize("text", ["causal", "causal & window(7)", "none"])
    def test_behind_a_cache(self, text: str) -> None:
        given = {
            "batch_size": 1, "q_length": 6, "kv_length": 20, "q_offset": 14, "mask_function": self.FUNCTIONS[text],
            "attention_mask": None,
        }  # fmt: skip
        mask = structured_mask(**given)
        assert mask.structure.end_aligned or text == "none"
        assert torch.equal(mask.dense(torch.device("cpu")).expand(1, 1, 6, 20), self.dense(**given))

    def test_into_a_static_cache(self) -> None:
        # The prompt is as long as the padding mask; the cache has room for more.
        given = {
            "batch_size": 2, "q_length": 6, "kv_length": 20, "q_offset": torch.tensor(0),
            "mask_function": self.FUNCTIONS["causal"], "attention_mask": torch.ones(2, 6, dtype=torch.bool),
        }  # fmt: skip
        mask = structured_mask(**given)
        assert str(mask.structure) == "causal" and mask.key_length == 6
        assert torch.equal(mask.dense(torch.device("cpu")).expand(2, 1, 6, 6), self.dense(**given)[..., :6])

    @pytest.mark.parametrize("function", ["union", "user", "chunks of left-padded sequences"])
    def test_what_is_not_understood_stays_a_tensor(self, function: str) -> None:
        chosen = {
            "union": masking_utils.or_masks(
                masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
            ),
            "user": lambda b, h, q, k: (q + k) % 2 == 0,
            "chunks of left-padded sequences": masking_utils.chunked_causal_mask_function(
                8, torch.tensor([3, 0])
            ),
        }[function]
        given = {
            "batch_size": 2,
            "q_length": 40,
            "kv_length": 40,
            "mask_function": chosen,
            "attention_mask": None,
        }
        assert torch.equal(structured_mask(**given, allow_is_causal_skip=False), self.dense(**given))

    def test_a_decoding_step_gets_one_row(self) -> None:
        given = {
            "batch_size": 1, "q_length": 1, "kv_length": 20, "q_offset": 19, "attention_mask": None,
            "mask_function": self.FUNCTIONS["causal"], "allow_is_causal_skip": False,
        }  # fmt: skip
        assert structured_mask(**given).shape == (1, 1, 1, 20)


KINDS = ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "bert", "modernbert", "bart", "vit"]


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_what_the_model_computes(kind: str, padding: str) -> None:
    if kind == "vit" and padding:
        pytest.skip("images are not padded")
    model = build(kind)
    given = inputs_of(kind, LENGTH, padding)
    formula = hidden(model, given)
    model.set_attn_implementation("fastattn")
    got = hidden(model, given)
    if kind in ("gemma2", "gpt_oss"):
        # Neither has SDPA; eager masks of float64 overflow in padded rows, and experts have no float64.
        torch.testing.assert_close(got, formula)
        return
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("sdpa")
    wanted = hidden(wide, {k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    assert_as_good_as(got, oracle=wanted, formula=formula)


def test_packed_documents() -> None:
    model = build("llama")
    given = inputs_of("llama", LENGTH)
    given["position_ids"] = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).expand(2, -1)
    given["use_cache"] = False
    formula = hidden(model, given)
    oracle = hidden(copy.deepcopy(model).double(), given)
    seen = []
    fa.route(model, **FMA)
    with observing(lambda site, operator, inputs, output: seen.append(str(inputs.mask))):
        hidden(model, given)
    assert seen == ["causal & segments"] * 2
    fa.route(model, operator="exact")
    assert_as_good_as(hidden(model, given), oracle=oracle, formula=formula)


class TestRoute:
    @pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
    def test_same_names_masks_and_outputs_as_the_graph_route(self, kind: str) -> None:
        model, given = build(kind, "sdpa"), inputs_of(kind, LENGTH, "right")
        given["attention_mask"] = given["attention_mask"].bool()
        fast = torch.compile(model, backend="fastattn", options={"compiler": "eager", "quiet": True, **FMA})
        wanted = hidden(fast, given)
        by_graph = {
            d.name: (d.operator, d.options, d.softmax.mask, d.softmax.kind, d.softmax.heads)
            for d in backend.decisions(model)
        }
        plan = fa.Plan({name: fa.PlannedSite(o, c) for name, (o, c, *_) in by_graph.items()})
        backend.reset()
        fa.route(model, plan=plan)
        got = hidden(model, given)
        torch.testing.assert_close(got, wanted)
        by_route = {
            d.name: (d.operator, d.options, d.softmax.mask, d.softmax.kind, d.softmax.heads)
            for d in backend.decisions(model)
        }
        assert by_route == by_graph and len(by_route) == 2

    def test_the_report_says_what_serves_and_why(self) -> None:
        model = build("gemma3")
        fa.route(model, plan=fa.Plan({"layers.1.self_attn": fa.PlannedSite("fma", {"block": 8}, "tried")}))
        hidden(model, inputs_of("gemma3", LENGTH))
        sites = {site.name: site for site in fa.report(model).sites}
        assert (
            sites["layers.0.self_attn"].operator == "exact"
            and "not named" in sites["layers.0.self_attn"].reason
        )
        assert sites["layers.1.self_attn"].operator == "fma" and sites["layers.1.self_attn"].reason == "tried"
        assert sites["layers.1.self_attn"].options["block"] == 8

    def test_refusals_have_reasons(self) -> None:
        for kind, word in (("gemma2", "soft cap"), ("gpt_oss", "sink")):
            model = build(kind)
            fa.route(model, **FMA)
            hidden(model, inputs_of(kind, LENGTH))
            assert all(site.operator == "exact" and word in site.reason for site in fa.report(model).sites)

    def test_cross_attention_is_known_at_equal_lengths(self) -> None:
        model, given = build("bart"), inputs_of("bart", LENGTH)
        fa.route(model, **FMA)
        hidden(model, {**given, "decoder_input_ids": given["input_ids"]})
        assert served(model) == {
            "encoder.layers.0.self_attn": "fma",
            "decoder.layers.0.self_attn": "fma",
            "decoder.layers.0.encoder_attn": "exact",
        }

    def test_a_4d_mask_of_the_user_stays_exact(self) -> None:
        model, given = build("llama", "sdpa"), inputs_of("llama", 20)
        given["attention_mask"] = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
        wanted = model(**given).last_hidden_state
        fa.route(model, **FMA)
        assert torch.equal(model(**given).last_hidden_state, wanted)
        assert all("4-D" in site.reason for site in fa.report(model).sites)

    @pytest.mark.parametrize("operator", ["fma", "window", "barnes_hut"])
    def test_causality(self, operator: str) -> None:
        model, given = build("llama"), inputs_of("llama", 96)
        fa.route(model, operator=operator, strict=True)
        before = hidden(model, given)
        given["input_ids"][:, 50:] = (given["input_ids"][:, 50:] + 1) % 99
        after = hidden(model, given)
        torch.testing.assert_close(after[:, :50], before[:, :50])
        assert not torch.equal(after[:, 50:], before[:, 50:])

    def test_no_mask_does_not_show_the_future(self) -> None:
        # A module that calls the attention function itself, as models without masking_utils do.
        from transformers import AttentionInterface

        attend = AttentionInterface()["fastattn"]
        module = torch.nn.Module()
        module.is_causal = True
        q, k, v = torch.randn(3, 1, 2, 10, 8)
        out, _ = attend(module, q, k, v, None)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, wanted.transpose(1, 2))

    def test_strict(self) -> None:
        model = build("gemma2")
        fa.route(model, **FMA, strict=True)
        with pytest.raises(UnsupportedSiteError, match=r"layers\.0\.self_attn.*soft cap"):
            model(**inputs_of("gemma2", LENGTH))

    def test_learned_parameters_serve_and_train(self) -> None:
        model, given = causal_lm(), inputs_of("llama", LENGTH)
        given["use_cache"] = False
        fa.attach(model, "fma", **given, options={"basis": "depthwise", "block": 8, "rank": 2})
        fa.route(model, **FMA, basis="depthwise")
        with torch.enable_grad():
            model(**given, labels=given["input_ids"]).loss.backward()
        assert set(served(model).values()) == {"fma"}
        learned = [p for name, p in model.named_parameters() if ".fastattn." in name]
        assert learned and all(p.grad is not None and bool(p.grad.any()) for p in learned)

    def test_dropout_keeps_a_site_exact_in_training(self) -> None:
        model = build("llama").train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        fa.route(model, **FMA)
        model(**inputs_of("llama", LENGTH))
        assert all(site.operator == "exact" and "dropout" in site.reason for site in fa.report(model).sites)

    def test_monitor(self) -> None:
        model = build("llama")
        fa.route(model, **FMA, monitor=1.0)
        hidden(model, inputs_of("llama", LENGTH))
        assert all(site.own_error_p95 > 0 for site in fa.report(model).sites)

    def test_unroute_and_scan(self) -> None:
        model, given = build("llama", "sdpa"), inputs_of("llama", LENGTH)
        given["use_cache"] = False
        wanted = hidden(model, given)
        before = fa.scan(model, **given).to_json()
        fa.route(model, **FMA)
        assert fa.scan(model, **given).to_json() == before
        assert not torch.equal(hidden(model, given), wanted)
        fa.unroute(model)
        assert torch.equal(hidden(model, given), wanted)
        assert not [name for module in model.modules() for name in vars(module) if "fastattn" in name]

    def test_a_plan_from_a_checkpoint_is_the_default(self) -> None:
        model = build("llama")
        with pytest.raises(OptionError, match="operator or option plan"):
            fa.route(model)
        model.fastattn_plan = fa.Plan.uniform(["layers.0.self_attn"], "window", width=16)
        fa.route(model)
        hidden(model, inputs_of("llama", LENGTH))
        assert served(model) == {"layers.0.self_attn": "window", "layers.1.self_attn": "exact"}

    def test_bad_requests(self) -> None:
        model = build("llama")
        with pytest.raises(OptionError, match="transformers"):
            fa.route(torch.nn.Linear(2, 2), operator="fma")
        with pytest.raises(OptionError, match="compiler"):
            fa.route(model, operator="fma", compiler="eager")
        with pytest.raises(PlanError, match="no module"):
            fa.route(model, plan=fa.Plan.uniform(["layers.9.self_attn"], "fma"))
        twice = {
            "layers.0.self_attn": fa.PlannedSite("fma"),
            "layers.0.self_attn#1": fa.PlannedSite("window"),
        }
        with pytest.raises(PlanError, match="several attentions"):
            fa.route(model, plan=fa.Plan(twice))


class TestCompiled:
    """A routed model under another compiler: the structure is known without a mask tensor."""

    @pytest.mark.parametrize("padding", ["", "right"])
    @pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "bert"])
    def test_whole_model(self, kind: str, padding: str) -> None:
        model, given = build(kind), {**inputs_of(kind, LENGTH, padding)}
        if kind != "bert":
            given["use_cache"] = False
        fa.route(model, **FMA, strict=True)
        wanted = hidden(model, given)
        backend.reset()
        masks = []
        fast = torch.compile(model, backend="aot_eager", fullgraph=True)
        with observing(lambda site, operator, inputs, output: masks.append(str(inputs.mask))):
            got = hidden(fast, given)
        torch.testing.assert_close(got, wanted)
        assert len(masks) == 2 and list(served(model).values()) == ["fma", "fma"]
        # Without an attention mask a compiled decoder cannot know that nothing is packed: documents travel along.
        assert ("segments" in masks[0]) == (kind != "bert" and not padding)

    def test_packed_documents(self) -> None:
        model, given = build("llama"), inputs_of("llama", LENGTH)
        given["position_ids"] = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)]).expand(2, -1)
        given["use_cache"] = False
        fa.route(model, operator="window", width=8)
        wanted = hidden(model, given)
        torch.testing.assert_close(
            hidden(torch.compile(model, backend="aot_eager", fullgraph=True), given), wanted
        )

    def test_single_blocks(self) -> None:
        model, given = build("mistral"), inputs_of("mistral", LENGTH, "left")
        given["use_cache"] = False
        fa.route(model, **FMA, strict=True)
        wanted = hidden(model, given)
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(hidden(model, given), wanted)

    def test_dynamic_length(self) -> None:
        model = build("llama")
        fa.route(model, **FMA, strict=True)
        fast = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
        call = partial(hidden, given=None)
        for length in (40, 64):
            given = {**inputs_of("llama", length, "right"), "use_cache": False}
            torch.testing.assert_close(call(fast, given=given), call(model, given=given))

    def test_training(self) -> None:
        model, given = causal_lm(), {**inputs_of("llama", LENGTH, "right"), "use_cache": False}
        fa.route(model, **FMA, strict=True)

        def gradients(call) -> list[torch.Tensor]:
            model.zero_grad()
            with torch.enable_grad():
                call(**given, labels=given["input_ids"]).loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        wanted = gradients(model)
        for got, want in zip(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), wanted):
            torch.testing.assert_close(got, want)
