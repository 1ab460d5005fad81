"""The backend: options, plans, dynamic lengths, training, learned parameters, bad input."""

from __future__ import annotations

import json

import pytest
import spellings
import torch
import torch.nn.functional as F
from backend.common import compiled, operators_used
from oracle import assert_as_good_as
from torch import nn

import fastattn_compile as fa
import fastattn_compile.backend as backend
from fastattn_compile.errors import ModelLoadError, NumericError, OptionError, PlanError, UnsupportedSiteError

FMA = {"operator": "fma", "block": 8, "rank": 2, "sinks": 2}


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def stack(depth: int = 2, dtype: torch.dtype = torch.float32) -> spellings.Stack:
    torch.manual_seed(0)
    return spellings.Stack(depth, 32, 4, causal).to(dtype)


def reference_stack(depth: int = 2, dtype: torch.dtype = torch.float32) -> spellings.Stack:
    """The same weights with the operator's dense definition as attention."""
    operator = fa.make_operator(**{"name": "fma", **{k: v for k, v in FMA.items() if k != "operator"}})

    def reference(q, k, v):
        from fastattn_compile.operators.base import AttentionInputs

        mask = fa.MaskStructure(right=0)
        return operator.reference(AttentionInputs(q, k, v, q.shape[-1] ** -0.5, mask)).out

    model = stack(depth, dtype)
    for block in model.blocks:
        block.spelling = reference
    return model


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"operater": "fma"}, "unknown option operater; options: operator, plan"),
            ({"operator": "flash"}, "unknown operator 'flash'; operators: exact, fma"),
            ({"operator": "fma", "blocks": 64}, "unknown option blocks of FmaConfig; valid options: .*block"),
            ({"operator": "fma", "block": "64"}, "option block of FmaConfig must be int, got '64'"),
            ({"operator": "fma", "block": 10, "rank": 4}, "rank must divide block"),
            ({"block": 64}, "fields of an operator's configuration need option operator"),
            ({"tolerance": -1}, "option tolerance must be a number >= 0, got -1"),
            ({"monitor": 2.0}, "option monitor must be a share between 0 and 1"),
            ({"strict": "yes"}, "option strict must be True or False"),
            ({"compiler": "tvm"}, "option compiler must be one of inductor, aot_eager, eager"),
            ({"operator": "fma", "plan": "plan.json"}, "either operator or plan"),
            ({"plan": 3}, "option plan must be a Plan, a path or a plan document"),
            ({"plan": "missing.json"}, "cannot read the plan missing.json"),
        ],
    )
    def test_bad_options_are_named(self, options: dict, message: str) -> None:
        with pytest.raises((OptionError, PlanError), match=message):
            backend.fastattn(torch.fx.symbolic_trace(nn.Identity()), [torch.ones(2)], options=options)

    def test_the_error_reaches_the_user_through_torch_compile(self) -> None:
        torch.compiler.reset()
        fast = torch.compile(causal, backend="fastattn", options={"operator": "flash"})
        with pytest.raises(Exception, match="unknown operator 'flash'"):
            fast(*torch.randn(3, 1, 2, 8, 4))

    def test_one_line_says_what_was_done(self, capsys: pytest.CaptureFixture[str]) -> None:
        compiled(stack(), **FMA, quiet=False)(torch.randn(1, 64, 32))
        assert capsys.readouterr().err.strip() == "fastattn: 2 attention sites: 2 fma"

    def test_strict_raises_with_the_reason(self) -> None:
        def cross(q, k, v):
            return F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5])

        with pytest.raises(Exception, match="strict: 1 attention sites cannot be served") as caught:
            compiled(cross, **FMA, strict=True)(*torch.randn(3, 1, 2, 8, 4))
        assert isinstance(caught.value, UnsupportedSiteError) or "cross attention" in str(caught.value)
        out = compiled(cross, **FMA)(*(x := torch.randn(3, 1, 2, 8, 4)))
        torch.testing.assert_close(out, cross(*x))
        (decision,) = backend.decisions()
        assert decision.operator == "exact" and "cross attention" in decision.reason


class TestPlan:
    def test_a_plan_serves_site_by_site(self, tmp_path) -> None:
        names = [line.name for line in fa.scan(stack(), torch.randn(1, 64, 32)).softmaxes]
        assert names == ["blocks.0", "blocks.1"]
        plan = fa.Plan({"blocks.1": fa.PlannedSite("fma", {"block": 8, "rank": 2})})
        plan.save(tmp_path / "plan.json")
        for given in (plan, tmp_path / "plan.json", json.loads((tmp_path / "plan.json").read_text())):
            compiled(stack(), plan=given)(torch.randn(1, 64, 32))
            assert operators_used() == {"blocks.0": "exact", "blocks.1": "fma"}
        assert fa.Plan.load(tmp_path / "plan.json") == plan

    def test_planned_sites_that_a_model_lacks_are_reported(self) -> None:
        planned = {"blocks.1": fa.PlannedSite("fma", {"block": 8}), "blocks.7": fa.PlannedSite("fma")}
        model = compiled(stack(), plan=fa.Plan({**planned, "blocks.8": fa.PlannedSite("exact")}))
        model(torch.randn(1, 64, 32))
        with pytest.warns(UserWarning, match=r"not compiled: blocks\.7; compiled were blocks\.0, blocks\.1"):
            assert fa.report(model).provenance["planned_not_found"] == ["blocks.7"]

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ([], "expected a plan"),
            ({"schema": "fastattn.plan/9"}, "fastattn.plan/9"),
            ({"schema": "fastattn.plan/1"}, "a plan holds 'sites'"),
            ({"schema": "fastattn.plan/1", "sites": {"a": 1}}, "site 'a': expected"),
            (
                {"schema": "fastattn.plan/1", "sites": {"a": {"operator": "x"}}},
                "site 'a': unknown operator 'x'",
            ),
            (
                {"schema": "fastattn.plan/1", "sites": {"a": {"operator": "fma", "options": {"rank": 3}}}},
                "site 'a': rank",
            ),
        ],
    )
    def test_bad_plans(self, document, message: str, tmp_path) -> None:
        with pytest.raises(PlanError, match=message):
            fa.Plan.from_json(document)
        path = tmp_path / "plan.json"
        path.write_text("{")
        with pytest.raises(PlanError, match="is not JSON"):
            fa.Plan.load(path)


class TestLengths:
    def test_one_graph_serves_several_lengths(self) -> None:
        model = stack()
        fast = compiled(model, dynamic=True, **FMA)
        reference = reference_stack()
        reference64 = reference_stack(dtype=torch.float64)
        for n in (40, 57, 130):
            x = torch.randn(1, n, 32)
            assert_as_good_as(fast(x), oracle=reference64(x.double()), formula=reference(x))
        assert len(backend.records()) == 1

    @pytest.mark.parametrize("n", [2, 5, 8, 9, 16, 17])
    def test_short_sequences_are_exact(self, n: int) -> None:
        x = torch.randn(1, n, 32)
        out = compiled(stack(), operator="fma", block=16, rank=4)(x)
        assert_as_good_as(out, oracle=stack(dtype=torch.float64)(x.double()), formula=stack()(x))

    def test_a_single_query_stays_exact(self) -> None:
        q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
        out = compiled(F.scaled_dot_product_attention, **FMA)(q, k, v)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
        assert set(operators_used().values()) == {"exact"}

    def test_graph_breaks_leave_every_site_served(self) -> None:
        class Broken(spellings.Stack):
            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                    torch._dynamo.graph_break()
                return x

        torch.manual_seed(0)
        broken, x = Broken(2, 32, 4, causal), torch.randn(1, 64, 32)
        out = compiled(broken, **FMA)(x)
        # Dynamo compiles a block once and runs it for every block of the same code.
        assert len(backend.records()) >= 1 and set(operators_used().values()) == {"fma"}
        torch.testing.assert_close(out, compiled(stack(), **FMA)(x))


class TestTraining:
    @pytest.mark.parametrize(
        "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_gradients_of_everything(self, compiler: str) -> None:
        x = torch.randn(2, 50, 32)

        def gradients(model, dtype=torch.float32):
            inputs = x.to(dtype, copy=True).requires_grad_()
            out = model(inputs)
            (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
            target = getattr(model, "_orig_mod", model)
            return {"x": inputs.grad, **{name: p.grad for name, p in target.named_parameters()}}

        got = gradients(compiled(stack(), **FMA, strict=True, compiler=compiler))
        oracle = gradients(reference_stack(dtype=torch.float64), torch.float64)
        # What the compiler does to the rest of the model is its own rounding: the formula goes through it too.
        formula = gradients(torch.compile(reference_stack(), backend=compiler))
        assert got.keys() == oracle.keys()
        for name, value in got.items():
            assert_as_good_as(value, oracle=oracle[name], formula=formula[name])

    def test_no_grad_and_inference_mode(self) -> None:
        model, x = stack(), torch.randn(1, 64, 32)
        fast = compiled(model, **FMA, compiler="aot_eager")
        trained = fast(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), trained)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), trained)

    def test_autocast(self) -> None:
        x = torch.randn(1, 64, 32)
        fast = compiled(stack(), **FMA, strict=True, compiler="aot_eager")
        reference = reference_stack()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, formula = fast(x), reference(x)
        assert out.dtype == formula.dtype
        assert_as_good_as(out, oracle=reference_stack(dtype=torch.float64)(x.double()), formula=formula)

    def test_activation_checkpointing(self) -> None:
        from torch.utils.checkpoint import checkpoint

        class Checkpointed(spellings.Stack):
            def forward(self, x):
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=False)
                return x

        torch.manual_seed(0)
        model = Checkpointed(2, 32, 4, causal)
        x = torch.randn(1, 64, 32, requires_grad=True)
        fast = compiled(model, **FMA, strict=True, compiler="aot_eager")
        fast(x).sum().backward()
        (grad,) = torch.autograd.grad(compiled(stack(), **FMA, compiler="aot_eager")(x).sum(), x)
        torch.testing.assert_close(x.grad, grad)


class TestDefault:
    """With no option the backend must never surprise."""

    def test_noise_is_kept_exact_and_the_output_is_the_original(self) -> None:
        q, k, v = torch.randn(3, 1, 2, 2048, 16)
        out = compiled(causal)(q * 4, k * 4, v)
        torch.testing.assert_close(out, causal(q * 4, k * 4, v), rtol=0, atol=0)
        (decision,) = backend.decisions()
        assert decision.operator == "exact" and decision.error > 0.01 and "above tolerance" in decision.reason

    def test_smooth_attention_is_replaced_within_tolerance(self) -> None:
        n = 2048
        t = torch.linspace(0, 6, n)[:, None] * torch.linspace(0.5, 1, 16)
        q, k, v = (torch.stack([torch.sin(t + s), torch.cos(t + s)])[None] for s in (0.0, 0.3, 0.6))
        out = compiled(causal)(q, k, v)
        (decision,) = backend.decisions()
        assert decision.operator == "fma" and decision.error <= 0.01 and "within tolerance" in decision.reason
        exact = causal(q, k, v)
        relative = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert relative.quantile(0.9) <= 0.01

    def test_short_sequences_are_not_even_measured(self) -> None:
        compiled(causal)(*torch.randn(3, 1, 2, 64, 16))
        (decision,) = backend.decisions()
        assert decision.operator == "exact" and decision.error is None and "predicted" in decision.reason

    def test_measuring_changes_nothing(self) -> None:
        class Counts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, q, k, v):
                self.calls.add_(1)
                return causal(q, k, v) + torch.rand(1)

        model = Counts()
        torch.manual_seed(1)
        fast = compiled(model)
        inputs = torch.randn(3, 1, 2, 2048, 16)
        torch.manual_seed(2)
        out = fast(*inputs)
        assert model.calls == 1
        torch.manual_seed(2)
        torch.testing.assert_close(out, causal(*inputs) + torch.rand(1))

    def test_the_monitor_keeps_measuring(self) -> None:
        model = stack()
        fast = compiled(model, **FMA, monitor=1.0)
        for _ in range(3):
            fast(torch.randn(1, 64, 32))
        (record,) = backend.records(model)
        assert {name: len(errors) for name, errors in record.monitor.errors.items()} == {
            "blocks.0": 3,
            "blocks.1": 3,
        }
        report = fa.report(fast)
        assert all(site.own_error_p95 > 0 for site in report.sites)
        assert report.provenance["monitored_calls"] == 6


# Without sinks every group is whole, and the initial combinations are the means to rounding.
DEPTHWISE = {"block": 8, "rank": 2, "basis": "depthwise", "sinks": 0}


class TestLearnedParameters:
    def test_they_are_parameters_of_the_model(self) -> None:
        model, x = stack(), torch.randn(1, 64, 32)
        before = set(model.state_dict())
        bundles = fa.attach(model, "fma", x, options=DEPTHWISE)
        added = set(model.state_dict()) - before
        assert set(bundles) == {"blocks.0", "blocks.1"}
        assert "blocks.0.fastattn.key_weight_1" in added
        assert all(name.split(".")[2] == "fastattn" for name in added)
        mean = compiled(stack(), operator="fma", block=8, rank=2, sinks=0)(x)
        learned = compiled(model, operator="fma", strict=True, **DEPTHWISE)(x)
        torch.testing.assert_close(learned, mean)  # they start as the means

    def test_the_optimizer_trains_them(self) -> None:
        model, x = stack(), torch.randn(1, 64, 32)
        bundles = fa.attach(model, "fma", x, options=DEPTHWISE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fast = compiled(model, operator="fma", strict=True, compiler="aot_eager", **DEPTHWISE)
        weight = bundles["blocks.1"].value_weight_1
        start, first = weight.detach().clone(), fast(x).square().mean()
        first.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        assert not torch.equal(weight, start)
        assert fast(x).square().mean() < first

    def test_saved_and_loaded(self) -> None:
        x = torch.randn(1, 64, 32)
        model, other = stack(), stack()
        for m in (model, other):
            fa.attach(m, "fma", x, options=DEPTHWISE)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.01)
        other.load_state_dict(model.state_dict())
        runs = [compiled(m, operator="fma", **DEPTHWISE)(x) for m in (model, other)]
        torch.testing.assert_close(*runs)

    def test_without_attaching_the_site_stays_exact(self) -> None:
        compiled(stack(), operator="fma", **DEPTHWISE)(torch.randn(1, 64, 32))
        assert set(operators_used().values()) == {"exact"}
        assert "fa.attach" in backend.decisions()[0].reason

    def test_attached_twice_and_detached(self) -> None:
        model, x = stack(), torch.randn(1, 64, 32)
        before = list(model.state_dict())
        fa.attach(model, "fma", x, options=DEPTHWISE)
        with pytest.raises(ValueError, match="attached to this model already"):
            fa.attach(model, "fma", x, options=DEPTHWISE)
        fa.detach(model)
        assert list(model.state_dict()) == before
        compiled(model, operator="exact")(x)


class TestBadInput:
    def test_not_a_model(self) -> None:
        with pytest.raises(ModelLoadError, match="scan needs a module or a function, got int"):
            fa.scan(3)

    def test_no_attention(self) -> None:
        model, x = nn.Linear(4, 4), torch.randn(2, 4)
        assert fa.scan(model, x).softmaxes == ()
        torch.testing.assert_close(compiled(model, **FMA, strict=True)(x), model(x))

    def test_values_of_another_head_dim(self) -> None:
        def attention(q, k, v):
            return (q @ k.mT * 0.3).softmax(-1) @ v[..., :5]

        q, k, v = torch.randn(3, 1, 2, 30, 8)
        out = compiled(attention, operator="fma", block=16, rank=4, strict=True)(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v))

    def test_a_site_that_reads_the_output_of_another_as_it_comes(self) -> None:
        def chained(x):
            return causal(causal(x, x, x), *(causal(x, x, x),) * 2)

        x = torch.randn(1, 2, 48, 8)
        found = compiled(chained, operator="fma", block=48, rank=4, strict=True)(x)
        torch.testing.assert_close(found, chained(x))
        assert list(operators_used().values()) == ["fma"] * 3

    def test_float64(self) -> None:
        inputs = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
        out = compiled(causal, operator="fma", block=16, rank=4, strict=True)(*inputs)
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, causal(*inputs), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
    def test_padding_masks_of_any_type(self, dtype: torch.dtype) -> None:
        def attention(q, k, v, real):
            s = q @ k.mT * 0.3
            return s.masked_fill(real[:, None, None, :] == 0, -1e9).softmax(-1) @ v

        q, k, v = torch.randn(3, 2, 2, 30, 8)
        real = torch.ones(2, 30).to(dtype)
        real[0, 20:] = 0
        out = compiled(attention, operator="fma", block=16, rank=4, strict=True)(q, k, v, real)
        torch.testing.assert_close(out, attention(q, k, v, real))
        assert backend.decisions()[0].softmax.mask == "key_padding"

    def test_a_row_that_sees_nothing_is_zero(self) -> None:
        def attention(q, k, v, real):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])

        q, k, v = torch.randn(3, 2, 2, 30, 8)
        real = torch.ones(2, 30, dtype=torch.bool)
        real[1] = False
        out = compiled(attention, operator="fma", block=8, rank=2, strict=True)(q, k, v, real)
        assert out[1].abs().max() == 0 and out.isfinite().all() and out[0].abs().max() > 0

    def test_nan_is_never_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = torch.randn(3, 1, 2, 30, 8)
        q[0, 0, 3, 0] = float("nan")
        fast = compiled(causal, operator="fma", block=8, rank=2, strict=True)
        out = fast(q, k, v)
        assert out[0, 0, 3].isnan().all() and out[0, 1].isfinite().all()
        monkeypatch.setenv("FASTATTN_CHECK", "1")
        with pytest.raises(
            NumericError, match=r"NaN or Inf in the output of site .*its inputs already held them"
        ):
            fast(q, k, v)

    def test_a_mask_that_is_not_understood_keeps_the_site(self) -> None:
        keep = torch.rand(30, 30) > 0.3

        def attention(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

        inputs = torch.randn(3, 1, 2, 30, 8)
        out = compiled(attention, **FMA)(*inputs)
        torch.testing.assert_close(out, attention(*inputs), rtol=0, atol=0)
        assert set(operators_used().values()) == {"exact"} and backend.decisions()[0].reason
