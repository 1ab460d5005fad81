"""Plans whose sites have heads that are served differently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn_compile as fa
from fastattn_compile.operators.base import SiteSpec
from fastattn_compile.operators.mask import CAUSAL
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.retrofitting.candidates import Costs
from fastattn_compile.retrofitting.journal import Journal
from fastattn_compile.retrofitting.per_head import mixtures

SPEC = SiteSpec(1, 4, 2, 512, 512, 8, 8, mask=CAUSAL)
COSTS = Costs("flops", None, Journal(None, {}))
LADDER = [{"width": 16}, {"width": 64}, {"width": 256}]


def rungs(ladder=LADDER, name="window"):
    operators = [(make_operator(name, **options), options) for options in ladder]
    return operators, [COSTS.of(operator, SPEC) for operator, _ in operators]


def found(shares, **options):
    operators, prices = rungs(**options)
    exact = COSTS.of(make_operator("exact"), SPEC)
    return mixtures(operators, prices, shares, SPEC, COSTS, exact)


def test_heads_that_differ_are_served_differently():
    # The first head needs the widest window, the second is served by any.
    mixed = found([(0.5, 1e-4), (0.4, 1e-5), (0.01, 1e-6)])
    operator, options, cost, own = next(m for m in mixed if "exact" not in str(m[1]))
    assert [options["parts"][h]["options"]["width"] for h in options["heads"]] == [256, 16]
    assert own == (0.01, 1e-4) and cost == operator.cost(SPEC).flops
    assert cost < 0.6 * COSTS.of(make_operator("window", width=256), SPEC)


def test_heads_that_agree_are_served_alike():
    assert found([(0.2, 0.2), (0.1, 0.1), (0.05, 0.05)]) == []


def test_one_key_head_or_learned_candidates_are_not_mixed():
    assert found([(0.2,), (0.1,), (0.05,)]) == []
    learned = [{"block": 16, "basis": "depthwise"}, {"block": 32, "basis": "depthwise"}]
    assert found([(0.5, 1e-4), (0.01, 1e-5)], ladder=learned, name="fma") == []


class TwoHeads(nn.Module):
    """A causal attention whose first head looks at its neighbours and whose second looks at tokens like its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, ids):
        x = self.embed(ids)
        place = torch.arange(ids.shape[1], dtype=x.dtype)
        turned = torch.stack([(place / 8).cos(), (place / 8).sin()] * 8, -1).expand_as(x)
        q = k = torch.stack([8 * turned, 3 * x], 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, torch.stack([x, x], 1), is_causal=True)
        return self.head(mixed.sum(1))


def test_a_plan_mixes_where_that_is_cheaper_and_the_compiled_model_follows_it():
    torch.manual_seed(0)
    model = TwoHeads().eval()
    data = [torch.randint(32, (1, 512)) for _ in range(2)]
    options = {"unit": "flops", "operators": {"window": LADDER}, "show_controls": False, "speedup": 1.5}
    plan = fa.plan(model, data, **options)
    (site,) = plan.sites.values()
    alike = fa.plan(model, data, per_head=False, **options)
    assert site.operator == "per_head"
    assert {s.operator for s in alike.sites.values()} == {"window"}
    drop, drop_alike = (p.provenance["search"]["drop"] for p in (plan, alike))
    assert drop < 0.9 * drop_alike
    again = fa.Plan.from_json(plan.to_json())
    fast = torch.compile(model, backend="fastattn", options={"plan": again, "compiler": "eager"})
    with torch.no_grad():
        exact, got = (f(data[0]).log_softmax(-1) for f in (model, fast))
    kl = (exact.exp() * (exact - got)).sum(-1).mean()
    assert 0 < float(kl) == pytest.approx(drop, rel=0.5)
