"""The same distillation by one, two and four processes, with FSDP2 over gloo; and resumed by another number of them."""

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from retrofitting import distil_worker

# Trained in float64: sums over processes differ by rounding, about 1e-16, which Adam can amplify by 1 / sqrt(v).
TOLERANCE = {"rtol": 1e-7, "atol": 1e-9}
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    distil_worker.__name__,
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
    ),
]


def start(folder, processes, stop_after=0, work=distil_worker.distil):
    """Runs a distillation in processes of their own; when one dies the others are ended, as torchrun does."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    made = [
        context.Process(
            target=distil_worker.main, args=(str(folder), stop_after, {**shared, "RANK": str(rank)}, work)
        )
        for rank in range(processes)
    ]
    for process in made:
        process.start()
    made[0].join(240)
    for process in made[1:]:
        process.join(1 if made[0].exitcode else 60)
        process.kill()
    return made[0].exitcode


def outcome(folder):
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process without a process group: what all others must come to."""
    torch.manual_seed(0)
    found = distil_worker.distil(tmp_path_factory.mktemp("alone"))
    assert [kept for _, _, kept in found["stages"]] == [True, True]
    return found


def same(found, alone):
    for (before, after, kept), (b, a, k) in zip(found["stages"], alone["stages"], strict=True):
        assert (before, after) == (pytest.approx(b, rel=1e-7), pytest.approx(a, rel=1e-7))
        assert kept == k
    for name, value in alone["state"].items():
        torch.testing.assert_close(found["state"][name], value, msg=name, **TOLERANCE)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_number_of_processes_does_not_matter(tmp_path, alone, processes):
    assert start(tmp_path, processes) == 0
    same(outcome(tmp_path), alone)


def test_many_layers_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    alone = distil_worker.distil_llama(tmp_path)
    assert alone["stages"][0][0] > 1e-3
    assert start(tmp_path, 2, work=distil_worker.distil_llama) == 0
    same(outcome(tmp_path), alone)


def test_torchrun_and_what_was_killed_is_resumed_by_fewer(tmp_path, alone):
    assert start(tmp_path, 4, stop_after=3) == 17
    assert list((tmp_path / "run").glob("step-1-2"))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            distil_worker.__file__, str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    same(outcome(tmp_path), alone)
