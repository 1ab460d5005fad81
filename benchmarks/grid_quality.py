"""What groups in the plane keep that groups along the sequence lose: relative output error on smooth images, untrained.

Keys and values are white noise blurred over the image by a Gaussian of some width in tokens, of unit variance; queries
are independent. Exact attention is the judge; every configuration is run on the same tensors, and its keys a query are
those of the cost model.

    python benchmarks/grid_quality.py
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rows import Rows
from torch import Tensor

from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "grid_quality.json"
BLURS = (0.0, 1.0, 2.0, 4.0, 8.0)
SIDE, CHANNELS = 64, 32
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plane, cells of 4 x 4, rank 1": {"grid": (SIDE, SIDE), "block": 16, "rank": 1},
    "plane, cells of 4 x 4, rank 4": {"grid": (SIDE, SIDE), "block": 16, "rank": 4},
    "plane, cells of 8 x 8, rank 4": {"grid": (SIDE, SIDE), "block": 64, "rank": 4},
    "sequence, blocks of 64, rank 4": {"block": 64, "rank": 4, "sinks": 0},
    "sequence, blocks of 64, rank 16": {"block": 64, "rank": 16, "sinks": 0},
    "sequence, blocks of 128, rank 16": {"block": 128, "rank": 16, "sinks": 0},
}


def smooth(blur: float, generator: torch.Generator) -> Tensor:
    """Noise blurred over the image (around its edges), ``(1, 1, n, d)``, every channel of unit variance."""
    noise = torch.randn(CHANNELS, SIDE, SIDE, generator=generator)
    frequency = torch.fft.fftfreq(SIDE)
    square = frequency[:, None] ** 2 + frequency**2
    low = torch.exp(-2 * (torch.pi * blur) ** 2 * square)
    image = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    image = image / image.flatten(1).std(1)[:, None, None]
    return image.flatten(1).T[None, None]


def error_of(name: str, blur: float, seed: int) -> tuple[float, float]:
    """Relative error (Frobenius) of the output, and keys a query."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 1, SIDE * SIDE, CHANNELS, generator=generator)
    inputs = AttentionInputs(query, smooth(blur, generator), smooth(blur, generator), CHANNELS**-0.5)
    exact = make_operator("exact").forward(inputs).out
    operator = make_operator("fma", **CONFIGURATIONS[name])
    out = operator.forward(inputs).out
    return float((out - exact).norm() / exact.norm()), operator.cost(inputs.spec()).keys_per_query


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    parser.add_argument("--fresh", action="store_true", help="measure again what the document holds")
    args = parser.parse_args()
    head = {"provenance": {"versions": versions(), "side": SIDE, "channels": CHANNELS}}
    rows = Rows(args.json, "fastattn.grid_quality/1", ("configuration", "blur"), head, args.fresh)
    for name in CONFIGURATIONS:
        for blur in BLURS:
            wanted = {"configuration": name, "blur": blur}
            if rows.find(wanted) is None:
                found = [error_of(name, blur, seed) for seed in range(args.seeds)]
                error = statistics.median([each[0] for each in found])
                rows.put(wanted | {"error": round(error, 4), "keys_per_query": round(found[0][1], 1)})
        mine = [row for row in rows.all if row["configuration"] == name]
        errors = "  ".join(f"{row['error']:.3f}" for row in mine)
        print(f"{name:34} {mine[0]['keys_per_query']:6.0f} keys   {errors}", flush=True)


if __name__ == "__main__":
    main()
