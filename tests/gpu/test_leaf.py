"""Attention through lists: leaves of trees, clusters."""

import pytest
import torch
from dense import check
from oracle import assert_as_good_as

from fastattn_compile.kernels.aten import cast_tiles
from fastattn_compile.kernels.aten.treeformer_ranges import Sight, node_ranges
from fastattn_compile.kernels.aten.treeformer_tf import Part
from fastattn_compile.kernels.aten.treeformer_tf import backward as aten_backward
from fastattn_compile.kernels.aten.treeformer_tf import forward as aten_forward
from fastattn_compile.kernels.gpu import leaf
from fastattn_compile.kernels.gpu.counting_sort import stable_order

SCALE = 0.3


def draw(batch, heads, length, channels, dtype, device):
    """A view whose tokens stand before its heads, as models make them."""
    return torch.randn(batch, length, heads, channels).to(device, dtype).transpose(1, 2)


def attention(device, dtype=torch.float32, batch=1, heads=2, kv_heads=1, length=70, height=2, causal=True, pad=False,
              capacity=0, channels=(16, 16)):  # fmt: skip
    """Tensors, the part that a tree makes of them, and who meets whom."""
    query = draw(batch, heads, length, channels[0], dtype, device)
    key = draw(batch, kv_heads, length, channels[0], dtype, device)
    value = draw(batch, kv_heads, length, channels[1], dtype, device)
    key_leaf = torch.randint(0, 1 << height, (batch, kv_heads, length), device=device)
    query_leaf = torch.randint(0, 1 << height, (batch, heads, length), device=device)
    real = (torch.rand(batch, length, device=device) > 0.2) if pad else None
    place = torch.arange(length, device=device)
    sight = Sight(
        torch.zeros_like(place), place + 1 if causal else torch.full_like(place, length), length, real
    )
    ranges = node_ranges(key_leaf, query_leaf, height, sight, height, not capacity, capacity)
    part = Part(ranges, length >> height, length >> height)
    slot = torch.arange(ranges.order.numel(), device=device)
    met = (slot >= ranges.start[..., None]) & (slot < ranges.stop[..., None])
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=device)
    at = (ranges.order % length).expand(met.shape)
    return query, key, value, part, visible.scatter_reduce(3, at, met, "amax")


def run(query, key, value, part, seeds):
    out, lse = leaf.forward(query, key, value, SCALE, part)
    grads = leaf.backward(query, key, value, SCALE, part, out, lse, *seeds)
    return [out, lse.squeeze(-1), *grads[:3]], grads[3]


CASES = {
    "ragged": {"batch": 2, "heads": 4, "kv_heads": 2, "height": 3, "pad": True, "channels": (16, 24)},
    "bidirectional": {"causal": False, "kv_heads": 2},
    "capacity": {"capacity": 5, "pad": True},
    "half": {"dtype": torch.float16},
    "bfloat": {"dtype": torch.bfloat16, "channels": (32, 16)},
}


@pytest.mark.parametrize("case", CASES)
def test_leaf_attention_is_that_of_the_ranges(case, device):
    query, key, value, part, visible = attention(device, **CASES[case])
    seeds = (
        torch.randn_like(value[:, :1].expand(-1, query.shape[1], -1, -1)),
        torch.randn(query.shape[:3], device=device),
    )
    got, said = run(query, key, value, part, seeds)
    check(got, query, key, value, SCALE, visible, seeds)
    wide = [x.double() for x in (query, key, value)]
    want = aten_backward(
        *wide, SCALE, [part], *aten_forward(*wide, SCALE, part), *(x.double() for x in seeds)
    )[3][0]
    exact = [x.float() for x in (query, key, value)]
    typical = aten_backward(
        *exact, SCALE, [part], *aten_forward(*exact, SCALE, part), *(x.float() for x in seeds)
    )[3][0]
    if query.dtype == torch.float32:
        assert_as_good_as(said.query, oracle=want.query, formula=typical.query, name="sums of queries")
        assert_as_good_as(said.key, oracle=want.key, formula=typical.key, name="sums of keys")


def test_the_past_does_not_depend_on_the_future(device):
    query, key, value, part, _ = attention(device, length=60)
    out, lse = leaf.forward(query, key, value, SCALE, part)
    later = query.clone(), key.clone(), value.clone()
    for x in later:
        x[:, :, 40:] = torch.nan
    changed, changed_lse = leaf.forward(*later, SCALE, part)
    assert torch.equal(changed[:, :, :40], out[:, :, :40])
    assert torch.equal(changed_lse[:, :, :40], lse[:, :, :40])


def test_a_key_that_is_not_finite_reaches_those_who_see_it(device):
    query, key, value, part, visible = attention(device, length=50, causal=False)
    value = value.clone()
    value[0, 0, 7, 3] = torch.inf
    out, _ = leaf.forward(query, key, value, SCALE, part)
    assert torch.equal(out.isnan().any(-1), visible[..., 7])


def test_the_same_gradients_every_time(device):
    query, key, value, part, _ = attention(device, length=40, kv_heads=1)
    seeds = torch.randn_like(query), torch.randn(query.shape[:3], device=device)
    first, second = (run(query, key, value, part, seeds)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("group", [1, 2])
def test_clusters_of_gathered_tokens(group, device):
    heads, batch, length, tiles, slots, d, e = 2, 1, 30, 3, 13, 16, 24
    query = torch.randn(heads, batch, length, group, d, device=device)
    key, value = (torch.randn(heads, batch, length, c, device=device) for c in (d, e))
    token = torch.stack([torch.randperm(length, device=device)[:slots] for _ in range(tiles)])
    offset = torch.randn(tiles, slots, device=device)
    offset[0, 4:] = offset[2] = -torch.inf
    seeds = (
        torch.randn(heads, tiles, slots * group, e, device=device),
        torch.randn(heads, tiles, slots * group, device=device),
    )
    out, lse = leaf.cluster_forward(query, key, value, SCALE, token, offset)
    grads = leaf.cluster_backward(query, key, value, SCALE, token, offset, out, lse, *seeds)

    def judge(dtype):
        q, k, v = (x.to(dtype).flatten(1, 2)[:, token] for x in (query, key, value))
        q, bias = q.flatten(2, 3), offset.to(dtype)
        found = cast_tiles.forward(q, k, v, SCALE, bias)
        return *found, *cast_tiles.backward(q, k, v, SCALE, bias, *found, *(x.to(dtype) for x in seeds))

    for got, oracle, formula in zip(
        (out, lse, *grads), judge(torch.float64), judge(torch.float32), strict=True
    ):
        assert_as_good_as(got, oracle=oracle, formula=formula)


@pytest.mark.parametrize(("length", "bins"), [(1, 1), (300, 16), (257, 65)])
def test_counting_sort_is_the_stable_sort(length, bins, device):
    code = torch.randint(0, bins, (2, length), device=device)
    assert torch.equal(stable_order(code, bins), torch.sort(code, dim=-1, stable=True).indices)


def test_obstacles():
    query, key, value, part, _ = attention("cpu", length=20)
    assert leaf.obstacle(query, key, value, [part]) == ""
    assert "several" in leaf.obstacle(query, key, value, [part, part])
    assert "float64" in leaf.obstacle(query.double(), key.double(), value.double(), [part])
    assert "type" in leaf.obstacle(query.half(), key, value, [part])
    hidden = Part(part.ranges, 1, 1, lambda queries, keys: queries[..., None] < 0)
    assert "hidden" in leaf.obstacle(query, key, value, [hidden])
