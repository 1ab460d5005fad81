"""One process of a distillation; the first writes what came out. Arguments: folder, step of the second stage to die at."""

import os
import sys

import torch
from retrofitting.test_distil import DATA, HELD_OUT, PLAN, prepared, stage

import fastattn_compile as fa

STAGES = [
    stage(steps=6),
    stage(name="language", objective="language_model", train="full", steps=6, learning_rate=1e-3),
]


def distil(folder, stop_after=0):
    """Trains in float64 and returns the model and what its stages reported."""

    def progress(name, done, total):
        if stop_after and name == "language" and done == stop_after:
            os._exit(17)

    torch.set_num_threads(1)
    model = prepared().double()
    result = fa.distil(
        model, PLAN, DATA, HELD_OUT, stages=STAGES, compiler="eager", folder=f"{folder}/run", checkpoint_every=2,
        progress=progress,
    )  # fmt: skip
    return {"state": model.state_dict(), "stages": [(s.before, s.after, s.kept) for s in result.stages]}


def main(folder, stop_after=0, environment=None):
    os.environ.update(environment or {})
    found = distil(folder, stop_after)
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{folder}/out.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
