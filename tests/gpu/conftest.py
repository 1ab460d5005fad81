import pytest
import torch

pytest.importorskip("triton")

from gpu_stage import INTERPRETED, RUNS, mend_bfloat16

if INTERPRETED:
    mend_bfloat16()


def pytest_collection_modifyitems(items):
    for item in items:
        if "machine_code" in item.path.name:
            if INTERPRETED:
                item.add_marker(
                    pytest.mark.skip(reason="kernels are made for the interpreter in this process")
                )
        elif item.path.parent.name == "gpu" and not RUNS:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, or a GPU"))


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


def _poisoned(make):
    def made(*arguments, **options):
        x = make(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return made


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that nobody wrote is NaN: a place that a kernel forgot shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
