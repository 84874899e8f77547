"""The shapes in which Triton kernels are launched: one table, by operator, kernel, sizes, dtype and
architecture. Importable without Triton.

Its rows are what the compilers make of the kernels, read by `python -m xattn_ops kernels --sweep`:
no bytes spilled first, then no product computed twice, then as many warps on a multiprocessor as
registers and shared memory let in, then fewer and larger warps' shares. Nothing is timed; who has
a card may (`_tuning`).

A tile of 64 rows is 4 warps' work where a product is `mma.sync` (sm_80, sm_120): of 8, each pair
computes the same. `wgmma` (sm_90) and `tcgen05` (sm_100) take their operands from shared memory,
and what more warps share is the registers of the accumulators. AMD's waves are twice as wide.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT = "sm_90"  # where kernels run without a card, in the interpreter
ANY = math.inf


class Problem(NamedTuple):
    """What the table knows of a call."""

    operator: str
    width: int  # channels of a head, or of a token where heads play no part
    tokens: int  # that share a softmax or a convolution
    dtype: torch.dtype
    form: str = ""  # what else takes registers, in a word of the operator's


class Shape(NamedTuple):
    """How a kernel is launched."""

    warps: int  # of a block
    stages: int  # of loads ahead of their use in loops
    edge: int  # of a tile, at most: rows, tokens or channels; 0 where the operator has no choice


class Row(NamedTuple):
    """A shape, and which kernels take it: those that all the columns let through."""

    warps: int
    stages: int = 1
    edge: int = 0
    kernel: str = ""  # names, or every kernel
    width: float = ANY  # up to
    tokens: float = ANY  # up to
    dtype: str = ""  # "short" or "float32"
    on: str = ""  # architectures
    form: str = ""

    def holds(self, kernel: str, problem: Problem, architecture: str) -> bool:
        return (
            kernel in (self.kernel.split() or [kernel])
            and problem.width <= self.width
            and problem.tokens <= self.tokens
            and self.dtype in ("", "float32" if problem.dtype == torch.float32 else "short")
            and architecture in (self.on.split() or [architecture])
            and problem.form in (self.form.split() or [problem.form])
        )


DIRECT = "forward_heads backward_rows backward_columns"
CONTEXT = "forward_context backward_context"
# The architectures that the table tells apart; others go by the nearest of these.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
NVIDIA = "sm_80 sm_90 sm_100 sm_120"
MMA = "sm_80 sm_120"  # a warp's own products

# The first row that holds a call is its own. The last of each operator holds every call.
TABLE: dict[str, tuple[Row, ...]] = {
    "ipsa": (  # edge: tokens of a window; form: shifted, padded, shifted+padded
        Row(1, kernel="expand_bias"),
        Row(4, kernel="sum_bias"),
        Row(8, 2, edge=64, dtype="float32", on=NVIDIA),
        Row(8, 2, edge=64, on="sm_100"),
        Row(4, 2, edge=64, kernel="forward"),
        Row(8, 2, edge=64, kernel="backward", form="shifted", on=NVIDIA),
        Row(8, 2, edge=64, kernel="backward", form="padded", on="sm_90"),
        Row(4, 3, edge=64, kernel="backward", on="sm_80"),
        Row(4, 1, edge=64, kernel="backward_rows", on=MMA),
        Row(4, 3, edge=64, kernel="backward_bias", on=MMA),
        Row(4, 2, edge=64),
    ),
    "cpsa": (  # edge: rows of a matrix, or tokens of a tile in the direct form
        Row(16, kernel="chain", on=NVIDIA),
        Row(4, kernel="absorb move chain"),
        Row(16, kernel="forward", dtype="float32", tokens=16, on=NVIDIA),
        Row(8, kernel="forward", dtype="float32", tokens=16),
        Row(8, edge=32, kernel="backward", dtype="float32", on=NVIDIA),
        Row(4, edge=32, kernel="backward", dtype="float32"),
        Row(4, 2, edge=64, dtype="short", kernel=DIRECT, on=MMA),
        Row(8, 2, edge=64, kernel=DIRECT, on=NVIDIA),
        Row(4, 2, edge=32, dtype="float32", kernel=DIRECT),  # 64 KiB are all that AMD has
        Row(4, 2, edge=64, kernel=DIRECT),
        Row(8, kernel="forward", tokens=8, on=NVIDIA),
        Row(4, kernel="forward", tokens=16, on=MMA),
        Row(4, edge=16, kernel="backward", tokens=1, on=MMA),
        Row(8, edge=16, kernel="backward", tokens=8, on=NVIDIA),
        Row(4, edge=32, kernel="backward", tokens=32, on=MMA),
        Row(8, edge=16, kernel="backward", tokens=16, on=NVIDIA),
        Row(4, edge=16, kernel="backward", tokens=16),
        Row(4, edge=64, kernel="backward", on="sm_80 sm_90 sm_120"),
        Row(8, edge=64, on=NVIDIA),
        Row(4, edge=64),
    ),
    "digest": (  # edge: queries, with half as many keys; of backward_table, tokens of a band
        Row(1, kernel="sum_table"),
        Row(8, 2, edge=64, width=64, dtype="float32", on=NVIDIA),
        Row(8, 2, edge=64, dtype="float32", on="sm_90 sm_100"),
        Row(8, 2, edge=32, dtype="float32", on=NVIDIA),  # 99 KiB are all that sm_86 and sm_120 have
        Row(4, 1, edge=32, dtype="float32", kernel="backward_table"),
        Row(4, 2, edge=32, dtype="float32"),
        Row(4, 3, edge=32, kernel="backward_table", on=MMA),
        Row(4, 2, edge=32, kernel="backward_table", on="sm_100"),
        Row(8, 2, edge=64, kernel="backward_table", on=NVIDIA),
        Row(4, 2, edge=64, width=32),
        Row(8, 2, edge=64, on="sm_100"),
        Row(4, 2, edge=64, width=64),
        Row(8, 2, edge=64, on=NVIDIA),
        Row(4, 1, edge=64, kernel="backward_table"),  # 64 KiB are all that AMD has
        Row(4, 2, edge=64),
    ),
    "merge": (  # edge: columns of the image
        Row(2, edge=32, kernel="merge_and_enhance"),
        Row(8, edge=32, kernel="weight_shares", on=MMA),
        Row(4, edge=32),
    ),
    "convrel": (  # edge: channels of a band
        Row(8, 2, edge=64, kernel="backward_context", on=NVIDIA),
        Row(8, 2, edge=64, kernel="forward_context", dtype="float32", on=NVIDIA),
        Row(4, 2, edge=64, kernel=CONTEXT),
        Row(8, edge=64, kernel="forward backward", dtype="float32", on=NVIDIA),
        Row(4, edge=64),
    ),
    "convpos": (Row(4, edge=64),),  # edge: channels of a band
    "clsattn": (  # edge: tokens of a tile
        Row(1, kernel="join_grads"),
        Row(4, kernel="fold join fold_grads finish"),
        Row(8, 2, edge=32, width=512, dtype="float32"),
        Row(8, 2, edge=16, dtype="float32"),
        Row(4, 2, edge=32, width=256),
        Row(4, 2, edge=32, width=384, on="gfx942"),
        Row(4, 2, edge=16, on="gfx942"),
        Row(4, 2, edge=32, width=384, kernel="forward", on="sm_80"),
        Row(4, 1, edge=32, width=384, kernel="forward", on="sm_120"),
        Row(4, 2, edge=16, width=384, kernel="backward", on="sm_120"),
        Row(8, 3, edge=16, width=384, kernel="backward", on="sm_100"),
        Row(8, 2, edge=32, width=512),
        Row(8, 3, edge=16, kernel="backward", on="sm_100"),
        Row(8, 2, edge=16),
    ),
}


# What did not fit its card, as the table cannot foresee of every width: how often the tiles of such
# calls were halved since.
_halved: dict[tuple[Problem, str], int] = {}
HALVINGS, LEAST_EDGE = 2, 16  # matrix products need 16


class Halved(Exception):
    """A kernel was too large for the card, and later launches of its problem will be smaller."""


def halve(problem: Problem, architecture: str) -> bool:
    """Whether the tiles of these launches could be made smaller; then `shape` gives such."""
    halvings = _halved.get((problem, architecture), 0)
    if halvings == HALVINGS:
        return False
    _halved[problem, architecture] = halvings + 1
    return True


def until_it_fits(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, begun again with smaller tiles where one of its kernels is too large for the card."""

    @functools.wraps(call)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        while True:
            try:
                return call(*args, **kwargs)
            except Halved:
                pass

    return repeated


def shape(problem: Problem, kernel: str, architecture: str) -> Shape:
    """What the table has for a kernel, or that with smaller tiles where it did not fit."""
    found = _in_table(problem, kernel, architecture)
    halvings = _halved.get((problem, architecture), 0) if _halved else 0
    if not halvings:
        return found
    return Shape(found.warps, 1, max(min(found.edge, LEAST_EDGE), found.edge >> halvings))


@functools.lru_cache(maxsize=1024)  # a launch asks anew each time
def _in_table(problem: Problem, kernel: str, architecture: str) -> Shape:
    known = nearest(architecture)
    for row in TABLE[problem.operator]:
        if row.holds(kernel, problem, known):
            return Shape(row.warps, row.stages, row.edge)
    raise KeyError(f"no row of {problem.operator} holds {kernel} on {known}")


@functools.cache
def nearest(architecture: str) -> str:
    """The architecture of the table whose rows serve this one: the newest of the same maker that is
    not newer, or the oldest."""
    maker, number = _split(architecture)
    known = [a for a in ARCHITECTURES if _split(a)[0] == maker]
    older = [a for a in known if _split(a)[1] <= number]
    return max(older or [min(known, key=_split)], key=_split)


def _split(architecture: str) -> tuple[str, int]:
    """("sm_", 90) or ("gfx", 0x942); AMD counts in hexadecimal digits."""
    maker, number = ("sm_", 10) if architecture.startswith("sm_") else ("gfx", 16)
    return maker, int(architecture.removeprefix(maker), number)


@functools.cache
def of_card(index: int) -> str:
    """The architecture of one card; a process may have cards of several."""
    card = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(card.gcnArchName).split(":")[0]
    return f"sm_{card.major}{card.minor}"
