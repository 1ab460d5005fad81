"""Memory that fast multipole attention takes on a GPU, counted without one: forward, and forward with backward.

The host's code of the Triton kernels runs on tensors without data, launches left out; every allocation is counted from
when it is made to when it is let go. What a GPU holds besides (the context, fragments of its allocator) is not in it.

    python benchmarks/memory_gpu.py --lengths 131072 1048576 --heads 32 --head-dim 128
"""

from __future__ import annotations

import argparse
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fastattn_compile.files import write_json
from fastattn_compile.kernels.gpu import fma
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.operators.registry import make_operator
from fastattn_compile.reporting.provenance import versions

RESULTS = Path(__file__).parent / "results" / "memory_gpu.json"


class Held(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has let go of; the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@contextmanager
def no_launches() -> Any:
    """Kernels are not launched."""
    with mock.patch.object(JITFunction, "__getitem__", lambda self, grid: lambda *given, **options: None):
        yield


def count(n: int, args: argparse.Namespace) -> dict[str, Any]:
    operator = make_operator("fma", block=args.block, rank=args.rank, sinks=args.sinks)
    mask = MaskStructure.parse("none" if args.bidirectional else "causal")
    dtype = getattr(torch, args.dtype)
    with no_launches(), Held() as held:
        query = torch.empty(1, args.heads, n, args.head_dim, dtype=dtype, device="meta")
        key, value = (
            torch.empty(1, args.kv_heads, n, args.head_dim, dtype=dtype, device="meta") for _ in range(2)
        )
        pattern = operator._pattern(AttentionInputs(query, key, value, 1.0, mask))
        inputs = held.bytes
        given = query, key, value, args.head_dim**-0.5, pattern
        out, lse = fma.forward(*given)
        forward = held.most
        grad = torch.empty_like(out)
        grads = fma.backward(*given, out, lse, grad)
        both, kept = held.most, held.bytes
        del grads
    sizes = {
        "n": n,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": args.dtype,
    }
    return {
        "operator": "fma", "config": operator.config.to_dict(), **sizes, "causal": not args.bidirectional,
        "inputs_bytes": inputs, "forward_bytes": forward, "both_bytes": both, "kept_bytes": kept,
    }  # fmt: skip


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 17, 1 << 20])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    return parser.parse_args(given)


def main() -> None:
    args = parse()
    print("      n     inputs    forward   and backward   of it tensors that stay  (GiB)")
    rows = []
    for n in args.lengths:
        row = count(n, args)
        rows.append(row)
        gib = {name: row[f"{name}_bytes"] / 2**30 for name in ("inputs", "forward", "both", "kept")}
        print(f"{n:8} {gib['inputs']:9.1f} {gib['forward']:9.1f} {gib['both']:12.1f} {gib['kept']:16.1f}")
    write_json(
        args.json, {"schema": "fastattn.memory/1", "counted": True, "versions": versions(), "rows": rows}
    )


if __name__ == "__main__":
    main()
