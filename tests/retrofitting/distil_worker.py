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


def distil_llama(folder, stop_after=0):
    """A model of transformers whose layers are more than Dynamo compiles of one function."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=9, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    sites = [f"model.layers.{number}.self_attn" for number in range(9)]
    plan = fa.Plan.uniform(sites, "window", width=4, sinks=1)
    data = [{"input_ids": torch.randint(31, (4, 24))} for _ in range(3)]
    result = fa.distil(model, plan, data[:2], data[2:], stages=[stage(steps=2)], compiler="eager")
    return {"state": model.state_dict(), "stages": [(s.before, s.after, s.kept) for s in result.stages]}


def main(folder, stop_after=0, environment=None, work=distil):
    os.environ.update(environment or {})
    found = work(folder, stop_after)
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{folder}/out.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
