"""Searches configurations of GPU kernels with no GPU: for every cell of the tables the first that fits, best first.

    python benchmarks/search_gpu_configs.py --architectures sm_90,sm_80 --widths 64,128 --missing

prints rows as ``fma_configs.py`` and ``op_configs.py`` in ``fastattn_compile/kernels/gpu`` hold them, each with what the
compiler said of it, and the cells that have none, for the list of the table that keeps the next search from them.
A kernel ``<kernel>_packed`` is that of packed documents, whose row is only needed where that of the kernel does not fit.
``--record tests/gpu/fma_recorded.json`` then writes down what the tests expect of the rows of ``fma_configs.py``; those of
``op_configs.py`` say it themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastattn_compile.kernels.gpu import fma_compile, fma_configs, op_compile, op_configs
from fastattn_compile.kernels.gpu.aot import SHARED_MEMORY, Report

Cell = tuple[str, str, str, int]
Config = fma_configs.Config | op_configs.Config
PACKED = "_packed"
# Bytes of a thread that spill where another tile may yet fit.
_CLOSE = 160

# Of kernels of fast multipole and window attention: rows, columns, far, warps, stages, split.
_WALKS = [
    (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (64, 64, 64, 4, 1), (64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 1),
    (64, 32, 32, 4, 1), (64, 16, 16, 8, 2), (64, 16, 16, 8, 1), (32, 32, 32, 4, 1), (32, 32, 32, 8, 1), (16, 32, 32, 4, 1),
    (16, 32, 32, 8, 2), (16, 32, 32, 8, 1), (32, 16, 16, 8, 2), (32, 16, 16, 8, 1), (16, 16, 16, 4, 2), (16, 16, 16, 8, 2),
    (16, 16, 16, 4, 1), (16, 16, 16, 8, 1),
]  # fmt: skip
_FAR = [
    (64, 0, 64, 4, 2), (64, 0, 64, 8, 2), (64, 0, 64, 4, 1), (64, 0, 64, 8, 1), (32, 0, 64, 8, 1), (64, 0, 64, 8, 2, True),
    (64, 0, 64, 8, 1, True), (32, 0, 64, 8, 1, True), (32, 0, 32, 4, 1), (32, 0, 32, 8, 1), (32, 0, 32, 8, 1, True),
    (16, 0, 64, 8, 1, True), (16, 0, 16, 4, 2), (16, 0, 16, 8, 2), (16, 0, 16, 4, 1), (16, 0, 16, 8, 1),
    (16, 0, 16, 4, 2, True), (16, 0, 16, 8, 2, True), (16, 0, 16, 4, 1, True), (16, 0, 16, 8, 1, True),
]  # fmt: skip
_KEYS = [
    (64, 64, 0, 4, 2), (64, 64, 0, 8, 2), (32, 64, 0, 8, 2), (64, 64, 0, 8, 1), (32, 64, 0, 8, 1), (64, 64, 0, 8, 2, True),
    (64, 64, 0, 8, 1, True), (32, 64, 0, 8, 1, True), (32, 32, 0, 4, 1), (32, 32, 0, 8, 1), (32, 32, 0, 8, 1, True),
    (16, 64, 0, 8, 1, True), (16, 16, 0, 4, 2), (16, 16, 0, 8, 2), (16, 16, 0, 4, 1), (16, 16, 0, 8, 1),
    (16, 16, 0, 4, 2, True), (16, 16, 0, 8, 2, True), (16, 16, 0, 4, 1, True), (16, 16, 0, 8, 1, True),
]  # fmt: skip
_SINKS = [
    (64, 0, 0, 4, 2), (64, 0, 0, 4, 1), (32, 0, 0, 4, 2), (32, 0, 0, 4, 1), (16, 0, 0, 4, 2),
    (16, 0, 0, 8, 2), (16, 0, 0, 4, 1), (16, 0, 0, 8, 1)
]  # fmt: skip
_STEPS = [
    (16, 64, 64, 4, 2), (16, 64, 64, 8, 2), (16, 32, 32, 8, 2), (16, 16, 16, 8, 2), (16, 16, 16, 8, 1), (16, 16, 16, 4, 2),
    (16, 16, 16, 4, 1)
]  # fmt: skip
_BANDS = list(dict.fromkeys((rows, columns, 0, *rest) for rows, columns, _, *rest in _WALKS))
# Of operator kernels: rows, columns, warps, stages.
_TILES = list(dict.fromkeys((rows, columns, *rest) for rows, columns, _, *rest in _WALKS))
_OF_KEYS = [
    (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1),
    (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 1), (16, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 2),
    (16, 16, 8, 2), (16, 16, 4, 1), (16, 16, 8, 1),
]  # fmt: skip
_FEW = [
    (16, 64, 4, 2), (16, 64, 8, 2), (16, 64, 4, 1), (16, 64, 8, 1), (16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 8, 1),
    (16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 4, 1), (16, 16, 8, 1),
]  # fmt: skip
_LEAVES = [
    (64, 0, 4, 2), (64, 0, 8, 2), (64, 0, 4, 1), (64, 0, 8, 1), (32, 0, 4, 2), (32, 0, 8, 2), (32, 0, 8, 1), (16, 0, 4, 2),
    (16, 0, 8, 2), (16, 0, 4, 1), (16, 0, 8, 1),
]  # fmt: skip
CANDIDATES = {
    "fma_fwd": _WALKS, "fma_dq": _WALKS, "fma_far": _FAR, "fma_dkv": _KEYS, "fma_sinks": _SINKS,
    "fma_decode": _STEPS, "window_fwd": _BANDS, "window_dq": _BANDS, "window_dkv": _KEYS,
    "leaf_fwd": _TILES, "leaf_dq": _TILES, "leaf_dkv": _OF_KEYS, "bh_fwd": _TILES, "bh_fwd_few": _FEW,
    "bh_dq": _TILES, "bh_dq_few": _FEW, "bh_dkv": _OF_KEYS, "bh_far_dkv": _LEAVES,
    "bh_fwd_pool": _TILES, "bh_fwd_few_pool": _FEW, "bh_dq_pool": _TILES, "bh_dq_few_pool": _FEW, "bh_far_dkv_pool": _LEAVES,
}  # fmt: skip


def reports(cell: Cell, config: Config) -> list[Report]:
    name, *rest = cell
    if isinstance(config, op_configs.Config):
        return op_compile.reports(name, *rest, config)
    return fma_compile.reports(name.removesuffix(PACKED), *rest, config, packed=name.endswith(PACKED))


def candidates(cell: Cell) -> list[Config]:
    """What is tried for a cell, best first."""
    return [_config(cell, sizes) for sizes in CANDIDATES[cell[0].removesuffix(PACKED)]]


def _config(cell: Cell, sizes: tuple) -> Config:
    made = op_configs.Config if cell[0] in op_compile.KERNELS else fma_configs.Config
    return made(*sizes)


def fits(cell: Cell, made: list[Report]) -> bool:
    name, architecture, kind, width = cell
    small = name.removesuffix(PACKED) in {*fma_compile.SMALL, *op_compile.SMALL}
    groups = architecture == "sm_90" and kind == "half" and width <= 128 and not small
    return bool(made) and all(
        r.fits(SHARED_MEMORY[architecture])
        and (not groups or (r.products["HGMMA"] > 0 and not r.products["HMMA"]))
        for r in made
    )


def row(cell: Cell, config: Config, made: list[Report]) -> str:
    """As the table holds it."""
    if isinstance(config, op_configs.Config):
        sizes = [config.rows, config.columns, config.warps, config.stages, made[0].registers]
        return " ".join(map(str, (*cell, *sizes)))
    sizes = [config.rows, config.columns, config.far, config.warps, config.stages]
    return " ".join(map(str, (*cell, *sizes, *(["split"] if config.split else []))))


def tried(cell: Cell, config: Config) -> list[Report]:
    """What the compiler says of each launch; nothing where it breaks."""
    try:
        return reports(cell, config)
    except Exception as error:
        print("#", *cell, config, type(error).__name__, flush=True)
        return []


def promising(cell: Cell) -> list[Config]:
    """What is worth a try: of float32 and 256 channels nothing where the least tiles spill, which large ones do slowly.

    Where they spill a few numbers only, tiles of up to 32 may yet fit.
    """
    listed = candidates(cell)
    if cell[2] == "half" and cell[3] < 256:
        return listed
    # Tiles of 16, and the least of 64 rows or keys, which Hopper's instruction takes.
    least = [c for c in listed if _widest(c) == 16][::-1]
    least += [c for c in listed if _widest(c) == 64 and c.warps == 8][-1:]
    close = False
    for config in least:
        if fits(cell, made := tried(cell, config)):
            return listed
        close |= bool(made) and max(max(r.spilled, r.stack) for r in made) <= _CLOSE
    return [c for c in listed if close and _widest(c) <= 32]


def _widest(config: Config) -> int:
    return max(config.rows, config.columns, getattr(config, "far", 0))


def search(cell: Cell) -> str:
    name = cell[0]
    plain = fma_configs.configs().get((name.removesuffix(PACKED), *cell[1:]))
    if name.endswith(PACKED) and plain and fits(cell, made := tried(cell, plain)):
        return f"# as without documents: {' '.join(map(str, cell))}  # {'; '.join(map(str, made))}"
    for config in promising(cell):
        if fits(cell, made := tried(cell, config)):
            return f"    {row(cell, config, made)}  # {'; '.join(map(str, made))}"
    return f"# none: {' '.join(map(str, cell))}"


def recorded(cell: Cell, packed: bool) -> list[tuple[int, int]]:
    config = fma_configs.configs()[cell]
    name, *rest = cell
    if packed:
        name += PACKED
        config = fma_configs.configs().get((name, *rest), config)
    return [(made.registers, made.programs(config.warps)) for made in reports((name, *rest), config)]


def record(path: Path, missing: bool) -> None:
    """Writes down what the compiler says of every row of the table, or of those that the file lacks."""
    before = json.loads(path.read_text())
    plain = [cell for cell in fma_configs.configs() if not cell[0].endswith(PACKED)]
    names = {"-".join(map(str, cell)): (cell, False) for cell in plain}
    names |= {
        f"{name}-packed": (cell, True)
        for name, (cell, _) in names.items()
        if cell[0] in fma_compile.PACKED and (cell[0] + PACKED, *cell[1:]) not in fma_configs.without()
    }
    wanted = {name: given for name, given in names.items() if not (missing and name in before)}
    with ProcessPoolExecutor(2) as pool:
        before |= zip(wanted, pool.map(recorded, *zip(*wanted.values()))) if wanted else {}
    path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(before[k])}" for k in names) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default=",".join(CANDIDATES))
    parser.add_argument("--architectures", default="sm_90,sm_80,sm_100,gfx942")
    parser.add_argument("--kinds", default="half,float")
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument(
        "--missing", action="store_true", help="leave out cells that have a row, or are known to have none"
    )
    parser.add_argument(
        "--record", type=Path, help="compile the table as it is, and write what is then expected of it"
    )
    given = parser.parse_args()
    if given.record:
        record(given.record, given.missing)
        return
    architectures, kinds, widths, kernels = (
        x.split(",") for x in (given.architectures, given.kinds, given.widths, given.kernels)
    )
    cells = [(k, a, t, int(w)) for a, t, w, k in itertools.product(architectures, kinds, widths, kernels)]
    if given.missing:
        known = {*fma_configs.configs(), *fma_configs.without(), *op_configs.configs(), *op_configs.without()}
        cells = [cell for cell in cells if cell not in known]
    with ProcessPoolExecutor(2) as pool:
        for found in pool.map(search, cells):
            print(found, flush=True)


if __name__ == "__main__":
    main()
