"""The report of the ahead-of-time compiler sees what it is to see."""

import pytest
import triton
import triton.language as tl

from fastattn_compile.kernels.gpu.aot import SHARED_MEMORY, TARGETS, compiled


@triton.jit
def product(X, Y, OUT, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    made = tl.dot(tl.load(X + at), tl.load(Y + at), input_precision=PRECISION)
    tl.store(OUT + at, made)


def report(kind, size, architecture="sm_90", precision="tf32", warps=4):
    types = {"X": f"*{kind}", "Y": f"*{kind}", "OUT": "*fp32"}
    return compiled(product, types, {"N": size, "PRECISION": precision}, architecture, warps, 1)


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_product_is_on_tensor_cores(architecture):
    made = report("bf16", 64, architecture)
    named = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[architecture]
    assert made.products[named] > 0 and made.spilled == 0, made
    assert made.registers > 16 and 0 < made.shared <= SHARED_MEMORY[architecture], made


def test_what_does_not_fit_is_seen():
    exact = report("fp32", 64, precision="ieee")
    assert exact.spilled > 0 and not any(exact.products.values()), exact
    # Too much shared memory compiles without a word.
    assert report("bf16", 256, warps=8).shared > SHARED_MEMORY["sm_90"]
