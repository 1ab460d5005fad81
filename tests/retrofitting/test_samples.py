"""Parameters that start from the tensors of a call: which tensors those are, and that nothing else changes."""

import pytest
import torch
from retrofitting.tiny import SITES, language, tokens

import fastattn_compile as fa
from fastattn_compile.operators.exact import ExactAttention
from fastattn_compile.retrofitting.samples import site_samples, visit_sites

CAST = {"clusters": 4, "clustering": "token_choice", "cluster_size": 16, "combine": "lse", "select": "key"}
CASES = [("cast", CAST), ("tf_attention", {"height": 2}), ("tc_attention", {"height": 2})]


def projected(model, site, x):
    """Query, key and value of a layer, from the model's own modules."""
    layers = dict(model.named_modules())
    hidden = model.embed(x)
    for number, layer in enumerate(model.layers):
        if f"layers.{number}.attention" == site:
            break
        hidden = layer(hidden)
    normed = layers[site.replace("attention", "norm")](hidden)
    heads = layers[site].qkv(normed).chunk(3, -1)
    return [y.unflatten(-1, (2, -1)).transpose(1, 2) for y in heads]


def test_samples_are_the_tensors_of_each_site():
    model, x = language(), tokens()
    samples = site_samples(model, SITES, x)
    assert list(samples) == SITES
    for site, sample in samples.items():
        for found, wanted in zip((sample.query, sample.key, sample.value), projected(model, site, x)):
            torch.testing.assert_close(found, wanted)
        assert sample.mask.causal and not sample.query.requires_grad


def test_visiting_leaves_the_model_and_what_is_compiled_of_it_alone():
    model, x = language(), tokens()
    fast = torch.compile(
        model, backend="fastattn", options={"operator": "exact", "compiler": "eager", "quiet": True}
    )
    before = fast(x)["logits"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    names = []
    visit_sites(model, lambda site, _: names.append(site), SITES[:1], x)
    assert names == SITES[:1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count + 1
    assert torch.equal(fast(x)["logits"], before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count + 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("operator", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_attached_parameters_start_from_the_call(operator, options):
    model, x = language(), tokens()
    bundles = fa.attach(model, operator, x, options=options)
    assert list(bundles) == SITES
    for site, sample in site_samples(model, SITES, x).items():
        wanted = bundles[site].operator.initial_parameters(sample.spec(), sample)
        torch.manual_seed(0)
        for name, value in wanted.items():
            torch.testing.assert_close(getattr(bundles[site], name).detach(), value)


@pytest.mark.parametrize(("operator", "options"), [CASES[0], CASES[2]], ids=["cast", "tc_attention"])
def test_they_start_closer_to_exact_attention_than_without(operator, options):
    x = tokens(batch=4, n=64)
    errors = []
    for calibrate in (True, False):
        model = language(seed=3)
        samples = site_samples(model, SITES, x)
        total = 0.0
        for site, bundle in fa.attach(model, operator, x, options=options, calibrate=calibrate).items():
            sample = samples[site]
            exact = ExactAttention().forward(sample).out
            out = bundle.operator.forward(sample, tuple(p.detach() for p in bundle.tensors())).out
            total += float((out - exact).norm() / exact.norm())
        errors.append(total)
    assert errors[0] < errors[1]


def test_trees_start_even():
    x, model = tokens(batch=4, n=64), language()
    samples = site_samples(model, SITES, x)
    even = []
    for calibrate in (True, False):
        bundles = fa.attach(model, "tf_attention", x, options={"height": 3}, calibrate=calibrate)
        parameters = tuple(p.detach() for p in bundles[SITES[0]].tensors())
        even.append(bundles[SITES[0]].operator.routing_statistics(samples[SITES[0]], parameters).imbalance)
        fa.detach(model)
    assert even[0] < 1.2 < even[1]


def test_without_calibration_they_start_from_the_sizes():
    model = language()
    bundles = fa.attach(model, "tf_attention", tokens(), options={"height": 2}, calibrate=False)
    for bundle in bundles.values():
        assert not bundle.key_offsets.any()
