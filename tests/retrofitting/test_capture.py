import pytest
import torch
from retrofitting.test_planning import Stack, batches

import fastattn_compile as fa
from fastattn_compile.errors import CheckpointError, OptionError, PlanError
from fastattn_compile.retrofitting.capture import Captured

NAMES = ("layers.0", "layers.1", "layers.2")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack().eval()


def by_hand(model, batch, layer):
    """Query, key and value of a layer, from the model's own weights."""
    x = model.embed(batch["input_ids"])
    for earlier in model.layers[:layer]:
        x = x + earlier(x)
    block = model.layers[layer]
    return [y.unflatten(-1, (2, -1)).transpose(1, 2) for y in block.qkv(x).chunk(3, -1)]


@torch.no_grad()
@pytest.mark.parametrize("to_disk", [False, True])
def test_tensors_are_those_of_the_model(model, tmp_path, to_disk):
    data = batches(3, 40)
    found = fa.capture(model, iter(data), folder=tmp_path if to_disk else None)
    assert found.sites == NAMES and found.batches == 3 and len(list(found)) == 9
    for source in (found, Captured.load(tmp_path)) if to_disk else (found,):
        inputs = source.read("layers.1", 2)
        for got, expected in zip((inputs.query, inputs.key, inputs.value), by_hand(model, data[2], 1)):
            torch.testing.assert_close(got, expected)
        assert str(inputs.mask) == "causal" and inputs.scale == pytest.approx(8**-0.5)


@torch.no_grad()
def test_statistics_of_many_batches_are_those_of_all_tokens(model):
    data = [batches(1, 24)[0], batches(1, 56, seed=1)[0]]
    found = fa.capture(model, data, statistics=True, sites=["layers.2"])
    kept = found.statistics["layers.2"]
    assert found.sites == ("layers.2",) and kept.tokens == 80
    key = torch.cat([by_hand(model, batch, 2)[1] for batch in data], 2)[0].double()
    torch.testing.assert_close(kept.mean["key"], key.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept.second["key"], key.mT @ key / 80, rtol=1e-4, atol=1e-6)
    assert kept.entropy.shape == (2,) and (kept.entropy > 0).all() and torch.isfinite(kept.largest).all()
    with pytest.raises(PlanError, match="statistics"):
        found.read("layers.2", 0)


def test_bad_input(model, tmp_path):
    with pytest.raises(OptionError, match="MiB of memory"):
        fa.capture(model, batches(3), memory=20_000)
    fa.capture(model, batches(3), memory=20_000, folder=tmp_path)  # a folder is not memory
    with pytest.raises(PlanError, match=r"layers\.9"):
        fa.capture(model, batches(1), sites=["layers.9"])
    with pytest.raises(OptionError, match="no batch"):
        fa.capture(model, [])

    def broken():
        yield batches(1)[0]
        raise OSError("disk gone")

    with pytest.raises(OptionError, match="OSError after 1 batches"):
        fa.capture(model, broken(), folder=tmp_path)
    with pytest.raises(CheckpointError, match="no whole capture"):
        Captured.load(tmp_path)  # the broken run left none
    found = fa.capture(model, batches(1), folder=tmp_path)
    victim = next(tmp_path.glob("*site0000.safetensors"))
    victim.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        found.read("layers.0", 0)
