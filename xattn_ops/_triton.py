"""What the Triton kernels of all operators share.

Only the `triton_kernels` of the operators import this file, and `_backend` imports those when a
call asks for them: importing xattn_ops never loads Triton. Under TRITON_INTERPRET=1, set before
Triton is loaded, the kernels run on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import _tiles, _tuning

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)  # softmax in powers of two: exp(x) = exp2(x * LOG2E)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32. PRECISION ("ieee" or "tf32") matters for float32 alone."""
    if INTERPRETED:  # numpy has no bfloat16, and sums products of float16 in float16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _words(seed, unit, place):
    """The random words of four queries at each place of an attention matrix, as `_dropout.philox`
    gives them."""
    state = tl.load(seed)
    key_low = (state & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((state >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = place * 0
    low = zero + (unit & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((unit >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(place, low, high, zero, key_low, key_high)


@triton.jit
def keep_weights(seed, unit, query_blocks, keys, n_keys, threshold, keep_scale):
    """Dropout of one tile of attention weights: keep_scale where a weight stays, 0 elsewhere.

    The counters are those of `_dropout.keep_mask`: query_blocks [R] number four queries each,
    keys [K]; the result is [4R, K].
    """
    place = (query_blocks[:, None] * n_keys + keys[None, :]).to(tl.uint32)
    w0, w1, w2, w3 = _words(seed, unit, place)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [R, K, low bit, high bit of the word]
    words = words.permute(0, 3, 2, 1).reshape(4 * query_blocks.shape[0], keys.shape[0])
    return tl.where(words.to(tl.int64) >= threshold, keep_scale, 0.0)


@triton.jit
def keep_weights_of_one(seed, units, keys, threshold, keep_scale):
    """`keep_weights` where the query is the only one of its unit: units [U], keys [K] -> [U, K]."""
    place = (units[:, None] * 0 + keys[None, :]).to(tl.uint32)
    w0, _w1, _w2, _w3 = _words(seed, units[:, None], place)
    return tl.where(w0.to(tl.int64) >= threshold, keep_scale, 0.0)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: Any
    programs: int
    warps: int
    stages: int
    arguments: dict[str, Any]


_record: list[Launch] | None = None
_recorded = _tiles.DEFAULT  # what launches are noted for, and what the interpreter plays


def launch(kernel: Any, programs: int, problem: _tiles.Problem, **arguments: Any) -> None:
    """Launch on the card of the first tensor, or only note the launch inside `recording`.

    programs: blocks of the grid; problem: for which `_tiles` has the shape of the launch.
    """
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    warps, stages, _ = shape(problem, kernel.__name__.strip("_"), first.device)
    if _record is not None:
        _record.append(Launch(kernel, programs, warps, stages, arguments))
        return

    def run(chosen: _tuning.Shape) -> None:
        kernel[(programs,)](**arguments, num_warps=chosen[0], num_stages=chosen[1])

    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        chosen = (warps, stages)
        if first.is_cuda and _tuning.wanted():
            chosen = _tuning.best(kernel, programs, arguments, chosen, run, first.device)
        try:
            run(chosen)
        except OutOfResources as error:
            raise _too_large(kernel, problem, first.device, error) from error


def _too_large(
    kernel: Any, problem: _tiles.Problem, device: torch.device, error: Exception
) -> Exception:
    """What to raise: with `Halved` the operator begins again, see `_tiles.until_it_fits`."""
    if _tiles.halve(problem, architecture_of(device)):
        return _tiles.Halved()
    return RuntimeError(
        f"the Triton kernel {kernel.__name__} does not fit this card at {problem.width} channels "
        f"in {problem.dtype} ({error}); backend='reference' takes them"
    )


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Collects launches in place of running them: on meta tensors, what a call would launch on
    cards of this architecture, as "sm_90" or "gfx942"."""
    global _record, _recorded
    _record, _recorded = [], architecture
    try:
        yield _record
    finally:
        _record, _recorded = None, _tiles.DEFAULT


def architecture_of(device: torch.device) -> str:
    """That of the card, or what is recorded or interpreted in its place."""
    on_card = device.type == "cuda" and _record is None
    return _tiles.of_card(device.index) if on_card else _recorded


def shape(problem: _tiles.Problem, kernel: str, device: torch.device) -> _tiles.Shape:
    """What the table has for a kernel on this device."""
    return _tiles.shape(problem, kernel, architecture_of(device))


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are formed: as torch.backends.cuda.matmul says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest tile edge that holds `size`; matrix products need 16."""
    return max(least, triton.next_power_of_2(size))


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dropout_options(dropout_p: float) -> dict[str, Any]:
    """What `keep_weights` needs besides the seed; the same for every operator."""
    return {
        "threshold": int(dropout_p * 2**32),
        "keep_scale": 1 / (1 - dropout_p),
        "DROPOUT": dropout_p > 0,
    }
