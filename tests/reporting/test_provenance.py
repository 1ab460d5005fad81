"""Hashes change exactly when what they stand for changes; nothing tells of the machine."""

import json
import socket

import pytest
import torch
from torch import nn

from fastattn_compile.reporting.provenance import inputs_hash, provenance, weights_hash


def small(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_weights_have_equal_hashes(dtype):
    assert weights_hash(small(dtype=dtype)) == weights_hash(small(dtype=dtype))


def test_any_weight_of_a_small_model_counts():
    hashes = {weights_hash(small()), weights_hash(small(1)), weights_hash(small().double())}
    for name, tensor in small().state_dict().items():
        changed = small()
        changed.state_dict()[name].view(-1)[-1 if tensor.dim() else 0] += 1
        hashes.add(weights_hash(changed))
    assert len(hashes) == 3 + len(small().state_dict())


def test_hash_ignores_strides_and_reads_large_tensors_in_samples():
    a, b = nn.Module(), nn.Module()
    table = torch.randn(300, 400)
    a.weight, b.weight = nn.Parameter(table), nn.Parameter(table.t().contiguous().t())
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad():
        b.weight.mul_(1.01)
    assert weights_hash(a) != weights_hash(b)


def test_inputs_hash_sees_values_places_and_types():
    ids = torch.arange(6).view(1, 6)
    variants = [
        {"input_ids": ids}, {"input_ids": ids + 1}, {"input_ids": ids.int()}, {"input_ids": ids.view(2, 3)},
        {"other": ids}, {"input_ids": ids, "use_cache": False}, {"input_ids": ids, "use_cache": True},
        (ids,), (ids, None),
    ]  # fmt: skip
    assert len({inputs_hash(inputs) for inputs in variants}) == len(variants)
    assert inputs_hash({"a": 1, "b": ids}) == inputs_hash({"b": ids.clone(), "a": 1})


def test_provenance_is_json_and_tells_nothing_of_the_machine(tmp_path):
    found = provenance(small(), (torch.zeros(2, 5),), seed=3, context={"command": "fastattn eval"})
    text = json.dumps(found)
    assert found["seed"] == 3
    assert found["dtype"] == "float32"
    assert found["command"] == "fastattn eval"
    assert found["versions"]["torch"] == torch.__version__
    assert "/" not in found["command"]
    assert socket.gethostname() not in text
    assert str(tmp_path.parent) not in text


def test_a_model_without_parameters_has_a_provenance():
    assert provenance(nn.Identity(), (), seed=0)["dtype"] is None
