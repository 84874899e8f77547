"""The emulator of CUDA kernels itself: its instructions against their documented layouts, and each
kind of fault, planted in a small kernel, in the flavour that must notice it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.emulator import (
    EMULATION,
    FLAVOURS,
    SCHEDULES,
    SHARED_LIMITS,
    emulated,
    flavours,
    load,
    missing,
    module_name,
)
from torch import Tensor

from xattn_ops._dropout import keep_mask

pytestmark = emulated
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of `mma`; float32 holds tf32
schedules = pytest.mark.parametrize("schedule", list(SCHEDULES))
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def ops(flavour: str, schedule: str = "forward") -> Any:
    load(flavour).configure(*SCHEDULES[schedule], SHARED_LIMITS["sm_90"])
    return getattr(torch.ops, module_name(flavour))


# ---------------------------------------------------------------------------- instructions


def layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Index of each value, as CUTLASS writes layouts: the first axis fastest."""
    index, out = np.arange(int(np.prod(shape))), 0
    for size, stride in zip(shape, strides, strict=True):
        out = out + index % size * stride
        index = index // size
    return out


# (lane, value) -> place in the column-major matrix, from CUTLASS' traits of the instructions:
# SM80_16x8x16 and, for tf32, SM80_16x8x8. Written apart from the emulator on purpose.
LANES_OF_A = {16: (32, 1), 8: (16, 1)}
A_LAYOUT = {16: ((2, 2, 2), (16, 8, 128)), 8: ((2, 2), (8, 64))}
B_LAYOUT = {16: ((2, 2), (8, 64)), 8: ((2,), (32,))}
LANES_OF_B = {16: (16, 1), 8: (8, 1)}
C_LAYOUT = ((2, 2), (16, 8))


def places(lanes: tuple[int, int], values: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    return layout((4, 8), lanes)[:, None] + layout(*values)


@flavours
@dtypes
def test_mma(flavour: str, dtype: torch.dtype) -> None:
    """Each value in the register where CUTLASS has it; of float32 inputs the tf32 bits count."""
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    fragment_a = a.T.flatten()[places(LANES_OF_A[depth], A_LAYOUT[depth])]
    fragment_b = b.flatten()[places(LANES_OF_B[depth], B_LAYOUT[depth])]  # B is (n, k)
    at = torch.from_numpy(places((32, 1), C_LAYOUT))
    registers = [t.contiguous().view(torch.int32) for t in (fragment_a, fragment_b)]
    got = ops(flavour).mma(*registers, c.T.flatten()[at], KINDS[dtype])
    want = torch.addmm(c.double(), truncated(a).double(), truncated(b).double())
    torch.testing.assert_close(got.double(), want.T.flatten()[at], atol=1e-5, rtol=0)


def truncated(t: Tensor) -> Tensor:
    """What a tensor core sees of float32: 10 bits of the mantissa."""
    if t.dtype != torch.float32:
        return t
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@flavours
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(flavour: str, count: int, transposed: bool) -> None:
    """Lane l gets, of each matrix, row l / 4, columns 2 (l % 4) and the next."""
    rows = torch.arange(256, dtype=torch.int16).view(32, 8)
    got = ops(flavour).ldmatrix(rows, count, transposed)
    for i in range(count):
        matrix = rows[8 * i : 8 * i + 8]
        seen = got[:, i].contiguous().view(torch.int16).view(8, 8)
        assert torch.equal(seen, matrix.T if transposed else matrix)
    assert not got[:, count:].any()


@flavours
@schedules
def test_exchanges(flavour: str, schedule: str) -> None:
    t = np.arange(32)
    third = sum(1 << i for i in range(0, 32, 3))
    want = [
        t ^ 5,
        np.where(t + 3 < 32, t + 3, t),
        np.where(t % 8 >= 3, t - 3, t),
        t // 8 * 8 + 2,
        np.where((t ^ 12) // 8 > t // 8, t, t ^ 12),
        np.full(32, third),
        np.where(t < 16, t ^ 8, t ^ 4),
        np.full(32, 2),
        np.full(32, 11),
        np.full(32, 2),
        np.full(32, t.sum() + 31),
    ]
    got = ops(flavour, schedule).exchanges(torch.zeros(1))
    assert np.array_equal(got.numpy(), np.array(want).astype(np.int32))


@flavours
@schedules
def test_cp_async(flavour: str, schedule: str) -> None:
    x = torch.randn(256)
    want = x.clone()
    want[128:].view(32, 4)[1::2] = 0  # not valid: zeros
    assert torch.equal(ops(flavour, schedule).copies(x), want.flip(0))


# --------------------------------------------------------------- what all operators share


@flavours
@dtypes
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_product(flavour: str, dtype: torch.dtype, a_transposed: bool, b_transposed: bool) -> None:
    """mma.cuh: also float32, whose products of three tf32 lose almost nothing."""
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    got = ops(flavour).product(
        a.T.contiguous() if a_transposed else a,
        b if b_transposed else b.T.contiguous(),
        a_transposed,
        b_transposed,
    )
    torch.testing.assert_close(got.double(), a.double() @ b.double(), atol=3e-6, rtol=0)


@flavours
@pytest.mark.parametrize("seed", [0, 5, -0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("p", [1e-12, 0.25, 0.999])
def test_dropout_mask(flavour: str, seed: int, p: float) -> None:
    got = ops(flavour).keep_weights(torch.tensor(seed), 3, 9, 5, p)
    mask = keep_mask(torch.tensor(seed), 3, 9, 5, p)
    torch.testing.assert_close(got, mask.float() / (1 - p), rtol=1e-6, atol=0)


@flavours
@dtypes
@pytest.mark.parametrize("parts", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 11, 4), (0, 3)])
def test_sum_parts(flavour: str, dtype: torch.dtype, parts: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(parts, *shape)
    got = ops(flavour).sum_parts(x, torch.empty(0, dtype=dtype))
    assert torch.equal(got, x.double().sum(0).float().to(dtype))


# ---------------------------------------------------------------------------------- faults

NO_BARRIER = "race: (read|write) of 4 bytes of shared memory that .* (read|wrote), no barrier"
BOTH = {  # noticed by every flavour, with what is said
    "shared_bounds": "past shared memory at faults.cu|shared memory out of bounds",
    "static_bounds": "write past a static shared array|an index out of a local array",
    "write_bounds": "write past a device tensor|device memory out of bounds",
    "barrier_after_return": "divergent __syncthreads: 32 threads wait at line .*, 32 have returned",
    "two_barriers": "divergent __syncthreads: thread 0 waits at line .*, thread 1 at line",
    "divergent_shuffle": "lane .* of the mask waits in __syncthreads|deadlock: thread 0 in shfl",
    "mask_without_lane": "mask 0000ffff lacks the calling lane",
    "misaligned_copy": "cp.async: the global address is no multiple of 16 bytes",
    "misaligned_ldmatrix": "ldmatrix: the address is no multiple of 16 bytes",
    "too_much_shared": "bytes of shared memory, a block may have",
}
BY_CHECKS = {  # by the checked flavour
    "read_bounds": "read of 4 bytes of device memory out of bounds",
    "write_to_input": "write of 4 bytes of device memory that the call only reads",
    "wild_read": "read of 4 bytes of device memory out of bounds",
    "uninitialised_shared": "read of 4 bytes of shared memory that is not initialised",
    "uninitialised_device": "read of 4 bytes of device memory that is not initialised",
    "read_after_write": NO_BARRIER,
    "write_after_read": NO_BARRIER,
    "lock_step": NO_BARRIER,
    "two_blocks": "race: write of 4 bytes of device memory that thread .* of another block wrote",
    "unwaited_copy": "read of 4 bytes of shared memory before the wait for its cp.async",
    "copy_without_barrier": f"{NO_BARRIER}|before the wait for its cp.async",
    "misaligned_store": "undefined behaviour: .* a misaligned vector access",
    "local_bounds": "undefined behaviour: an index out of a local array",
    "sum_without_atomic": NO_BARRIER,
}
BY_RESULTS = {  # and these by what comes out, under one schedule or another, in the plain flavour
    "uninitialised_shared",
    "uninitialised_device",
    "unwritten",
    "read_after_write",
    "write_after_read",
    "lock_step",
    "two_blocks",
    "unwaited_copy",
    "copy_without_barrier",
}


def planted(flavour: str, name: str, planted: bool, schedule: str) -> list[float] | str:
    """The results, or the fault in words."""
    module = load(flavour)
    module.configure(*SCHEDULES[schedule], SHARED_LIMITS["sm_90"])
    try:
        return module.plant(name, planted)
    except RuntimeError as error:
        return str(error)


def fault_names() -> list[str]:
    return [] if missing() else sorted({*BOTH, *BY_CHECKS, *BY_RESULTS})


def test_every_kind_of_fault_is_expected() -> None:
    assert sorted(load("plain").faults()) == fault_names()


@flavours
@schedules
@pytest.mark.parametrize("name", fault_names())
def test_sound_kernels_pass(flavour: str, name: str, schedule: str) -> None:
    results = [planted(f, name, False, s) for f, s in ((flavour, schedule), ("plain", "forward"))]
    assert results[0] == results[1]
    assert np.isfinite(results[0]).all()


@schedules
@pytest.mark.parametrize(
    ("flavour", "name"),
    [(flavour, name) for flavour in FLAVOURS for name in BOTH]
    + [("checked", name) for name in BY_CHECKS],
)
def test_planted_faults_are_noticed(flavour: str, name: str, schedule: str) -> None:
    said = planted(flavour, name, True, schedule)
    assert isinstance(said, str), "not noticed"
    assert re.search((BOTH | BY_CHECKS)[name], said), said


@pytest.mark.parametrize("name", sorted(BY_RESULTS))
def test_planted_faults_show_in_results(name: str) -> None:
    sound = planted("plain", name, False, "forward")
    wrong = [planted("plain", name, True, schedule) for schedule in SCHEDULES]
    assert any(result != sound for result in wrong)


def test_a_fault_is_told_with_its_place() -> None:
    said = planted("checked", "read_bounds", True, "forward")
    assert said == (
        "read of 4 bytes of device memory out of bounds at faults.cu:"
        f"{line_of('in[threadIdx.x + planted]')} [block (0,0,0) thread (63,0,0)]"
    )


def line_of(text: str) -> int:
    lines = (EMULATION / "faults.cu").read_text().splitlines()
    (number,) = (i + 1 for i, line in enumerate(lines) if text in line)
    return number
