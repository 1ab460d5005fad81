"""Searches configurations of GPU kernels with no GPU: for every cell of the table the first that fits, best first.

    python benchmarks/search_gpu_configs.py --architectures sm_90,sm_80 --widths 64,128

prints rows as ``fastattn_compile/kernels/gpu/fma_configs.py`` holds them, each with what the compiler said of it;
``--record tests/gpu/fma_recorded.json`` then writes down what the tests expect of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastattn_compile.kernels.gpu.aot import SHARED_MEMORY
from fastattn_compile.kernels.gpu.fma_compile import KERNELS, reports
from fastattn_compile.kernels.gpu.fma_configs import Config, configs

_WALKS = [
    (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 1),
    (64, 16, 16, 8, 2), (64, 16, 16, 8, 1), (32, 32, 32, 4, 1), (32, 32, 32, 8, 1), (16, 32, 32, 4, 1),
    (16, 16, 16, 4, 1), (16, 16, 16, 8, 1),
]  # fmt: skip
_FAR = [
    (64, 0, 64, 4, 2), (64, 0, 64, 8, 2), (64, 0, 64, 4, 1), (64, 0, 64, 8, 1), (32, 0, 64, 8, 1), (64, 0, 64, 8, 2, True),
    (64, 0, 64, 8, 1, True), (32, 0, 64, 8, 1, True), (32, 0, 32, 4, 1), (32, 0, 32, 8, 1), (16, 0, 16, 4, 1),
]  # fmt: skip
_KEYS = [
    (64, 64, 0, 4, 2), (64, 64, 0, 8, 2), (32, 64, 0, 8, 2), (64, 64, 0, 8, 1), (32, 64, 0, 8, 1), (64, 64, 0, 8, 2, True),
    (64, 64, 0, 8, 1, True), (32, 64, 0, 8, 1, True), (32, 32, 0, 4, 1), (32, 32, 0, 8, 1), (16, 16, 0, 4, 1),
]  # fmt: skip
_SINKS = [(64, 0, 0, 4, 2), (64, 0, 0, 4, 1), (32, 0, 0, 4, 2), (32, 0, 0, 4, 1), (16, 0, 0, 4, 1)]
_STEPS = [
    (16, 64, 64, 4, 2), (16, 64, 64, 8, 2), (16, 32, 32, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 8, 1), (16, 16, 16, 4, 1)
]  # fmt: skip
_BANDS = list(dict.fromkeys((rows, columns, 0, *rest) for rows, columns, _, *rest in _WALKS))
CANDIDATES = {
    "fma_fwd": _WALKS, "fma_dq": _WALKS, "fma_far": _FAR, "fma_dkv": _KEYS, "fma_sinks": _SINKS,
    "fma_decode": _STEPS, "window_fwd": _BANDS, "window_dq": _BANDS, "window_dkv": _KEYS,
}  # fmt: skip


def search(cell: tuple[str, str, str, int]) -> str:
    name, architecture, kind, width = cell
    for candidate in CANDIDATES[name]:
        config = Config(*candidate)
        try:
            made = reports(name, architecture, kind, width, config)
        except Exception as error:
            print("#", *cell, candidate, type(error).__name__, flush=True)
            continue
        if all(r.fits(SHARED_MEMORY[architecture]) for r in made):
            row = [*cell, *candidate[:5], *(["split"] if config.split else [])]
            return f"    {' '.join(map(str, row))}  # {'; '.join(map(str, made))}"
    return "# " + " ".join(map(str, cell)) + " none"


def recorded(cell: tuple[str, str, str, int], packed: bool) -> list[tuple[int, int]]:
    config = configs()[cell]
    if packed:
        config = configs().get((f"{cell[0]}_packed", *cell[1:]), config)
    return [(made.registers, made.programs(config.warps)) for made in reports(*cell, config, packed=packed)]


def record(path: Path) -> None:
    """Writes down what the compiler says of every row of the table."""
    # Of packed documents, the rows that the file has.
    before, plain = (
        json.loads(path.read_text()),
        [cell for cell in configs() if not cell[0].endswith("_packed")],
    )
    names = {"-".join(map(str, cell)): (cell, False) for cell in plain}
    names |= {
        f"{name}-packed": (cell, True) for name, (cell, _) in names.items() if f"{name}-packed" in before
    }
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(names, pool.map(recorded, *zip(*names.values()))))
    path.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--architectures", default="sm_90,sm_80,sm_100,gfx942")
    parser.add_argument("--kinds", default="half,float")
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument(
        "--record", type=Path, help="compile the table as it is, and write what is then expected of it"
    )
    given = parser.parse_args()
    if given.record:
        record(given.record)
        return
    architectures, kinds, widths, kernels = (
        x.split(",") for x in (given.architectures, given.kinds, given.widths, given.kernels)
    )
    cells = [(k, a, t, int(w)) for a, t, w, k in itertools.product(architectures, kinds, widths, kernels)]
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(search, cells):
            print(row, flush=True)


if __name__ == "__main__":
    main()
