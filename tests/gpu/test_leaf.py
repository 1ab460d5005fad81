"""Attention through lists: leaves of trees, clusters."""

import pytest
import torch
from dense import check
from oracle import assert_as_good_as

from fastattn_compile.kernels.aten import cast_tiles
from fastattn_compile.kernels.aten.treeformer_ranges import Sight, near_ranges, node_ranges
from fastattn_compile.kernels.aten.treeformer_tf import NearPairs, Part
from fastattn_compile.kernels.aten.treeformer_tf import attend as aten_attend
from fastattn_compile.kernels.aten.treeformer_tf import backward as aten_backward
from fastattn_compile.kernels.gpu import leaf
from fastattn_compile.kernels.gpu.counting_sort import stable_order

SCALE = 0.3


def draw(batch, heads, length, channels, dtype, device):
    """A view whose tokens stand before its heads, as models make them."""
    return torch.randn(batch, length, heads, channels).to(device, dtype).transpose(1, 2)


def attention(device, dtype=torch.float32, batch=1, heads=2, kv_heads=1, length=70, height=2, causal=True, pad=False,
              capacity=0, channels=(16, 16), window=0):  # fmt: skip
    """Tensors, the parts that a window (with some sinks) and a tree make of them, and who meets whom."""
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
    parts, near, sinks = [], torch.zeros(length, length, dtype=torch.bool, device=device), None
    hidden = None
    if window:
        low, high = (x.expand(batch, heads, length) for x in (place - window + 1, place + window))
        near = (
            (place >= low[0, 0, :, None]) & (place < high[0, 0, :, None]) & (place < place[:, None] + causal)
        )
        sinks = torch.rand(batch, length, device=device) < 0.1
        parts.append(Part(near_ranges(heads, kv_heads, batch, sight, low, high), window, 16))
        hidden = NearPairs(low, high, length, kv_heads, sinks)
    parts.append(Part(ranges, length >> height, length >> height, hidden))
    slot = torch.arange(ranges.order.numel(), device=device)
    met = (slot >= ranges.start[..., None]) & (slot < ranges.stop[..., None])
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=device)
    at = (ranges.order % length).expand(met.shape)
    visible = visible.scatter_reduce(3, at, met, "amax")
    if sinks is not None:
        visible = (visible & ~sinks[:, None, None]) | (near if real is None else near & real[:, None, None])
    return query, key, value, parts, visible


def run(query, key, value, parts, seeds):
    out, lse = leaf.attend(query, key, value, SCALE, parts)
    grads = leaf.backward(query, key, value, SCALE, parts, out, lse, *seeds)
    return [out, lse.squeeze(-1), *grads[:3]], grads[3][-1]


CASES = {
    "ragged": {"batch": 2, "heads": 4, "kv_heads": 2, "height": 3, "pad": True, "channels": (16, 24)},
    "bidirectional": {"causal": False, "kv_heads": 2},
    "capacity": {"capacity": 5, "pad": True},
    "half": {"dtype": torch.float16},
    "bfloat": {"dtype": torch.bfloat16, "channels": (32, 16)},
    "window": {"window": 6, "pad": True, "length": 50, "batch": 2, "heads": 4, "kv_heads": 2},
    "window-half": {"window": 6, "dtype": torch.float16, "length": 50},
    "window-bfloat": {"window": 6, "dtype": torch.bfloat16, "length": 50},
}


@pytest.mark.parametrize("case", CASES)
def test_leaf_attention_is_that_of_the_ranges(case, device):
    query, key, value, parts, visible = attention(device, **CASES[case])
    seeds = (
        torch.randn_like(value[:, :1].expand(-1, query.shape[1], -1, -1)),
        torch.randn(query.shape[:3], device=device),
    )
    got, said = run(query, key, value, parts, seeds)
    check(got, query, key, value, SCALE, visible, seeds)
    wide = [x.double() for x in (query, key, value)]
    want = aten_backward(
        *wide, SCALE, parts, *aten_attend(*wide, SCALE, parts), *(x.double() for x in seeds)
    )[3][-1]
    exact = [x.float() for x in (query, key, value)]
    typical = aten_backward(
        *exact, SCALE, parts, *aten_attend(*exact, SCALE, parts), *(x.float() for x in seeds)
    )[3][-1]
    if query.dtype == torch.float32:
        assert_as_good_as(said.query, oracle=want.query, formula=typical.query, name="sums of queries")
        assert_as_good_as(said.key, oracle=want.key, formula=typical.key, name="sums of keys")


def test_the_past_does_not_depend_on_the_future(device):
    query, key, value, parts, _ = attention(device, length=60)
    out, lse = leaf.attend(query, key, value, SCALE, parts)
    later = query.clone(), key.clone(), value.clone()
    for x in later:
        x[:, :, 40:] = torch.nan
    changed, changed_lse = leaf.attend(*later, SCALE, parts)
    assert torch.equal(changed[:, :, :40], out[:, :, :40])
    assert torch.equal(changed_lse[:, :, :40], lse[:, :, :40])


def test_a_key_that_is_not_finite_reaches_those_who_see_it(device):
    query, key, value, parts, visible = attention(device, length=50, causal=False)
    value = value.clone()
    value[0, 0, 7, 3] = torch.inf
    out, _ = leaf.attend(query, key, value, SCALE, parts)
    assert torch.equal(out.isnan().any(-1), visible[..., 7])


def test_the_same_gradients_every_time(device):
    query, key, value, parts, _ = attention(device, length=40, kv_heads=1)
    seeds = torch.randn_like(query), torch.randn(query.shape[:3], device=device)
    first, second = (run(query, key, value, parts, seeds)[0] for _ in range(2))
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
    query, key, value, parts, _ = attention("cpu", length=20)
    assert leaf.obstacle(query, key, value, parts) == ""
    assert leaf.obstacle(query, key, value, parts * 2) == ""
    assert "float64" in leaf.obstacle(query.double(), key.double(), value.double(), parts)
    assert "type" in leaf.obstacle(query.half(), key, value, parts)
    hidden = Part(parts[0].ranges, 1, 1, lambda queries, keys: queries[..., None] < 0)
    assert "hidden" in leaf.obstacle(query, key, value, [hidden])
