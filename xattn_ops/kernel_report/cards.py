"""What an architecture lets a block have, by its maker's tables."""

from __future__ import annotations

from typing import NamedTuple

from xattn_ops._tiles import nearest

KIB = 1024
BLOCKS, REGISTERS = 32, 2048  # of a multiprocessor: blocks at most, registers a lane


class Card(NamedTuple):
    """Limits of an architecture. A multiprocessor has 1 KiB of shared memory more, which CUDA keeps
    of it for each block."""

    shared: int  # bytes that a block may ask for
    warps: int  # of a multiprocessor, at most


CARDS = {
    "sm_80": Card(163 * KIB, 64),
    "sm_86": Card(99 * KIB, 48),
    "sm_89": Card(99 * KIB, 48),
    "sm_90": Card(227 * KIB, 64),
    "sm_100": Card(227 * KIB, 64),
    "sm_120": Card(99 * KIB, 48),
    "gfx942": Card(64 * KIB, 32),
}
CUDA_ARCHITECTURES = tuple(name for name in CARDS if name.startswith("sm_"))


def least_shared(architecture: str) -> int:
    """Bytes that every card lets a block have which is launched as this one (see _tiles)."""
    served = nearest(architecture)
    return min(card.shared for name, card in CARDS.items() if nearest(name) == served)
