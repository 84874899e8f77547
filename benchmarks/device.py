"""Where the operands lie, and what timing there needs: waiting for results, emptying caches."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from xattn_ops.benchmarks.options import DEVICES

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def check(device: str) -> None:
    """Raise ValueError unless this torch can compute there."""
    if device not in DEVICES:
        raise ValueError(f"no device {device!r}; there are {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        why = "" if torch.version.cuda else f", torch {torch.__version__} is built without CUDA"
        raise ValueError(f"--device cuda needs a CUDA device that torch sees{why}")


def wait_for(device: str) -> Callable[[], None] | None:
    """What waits for everything launched there; None where calls return with their results."""
    return torch.cuda.synchronize if device == "cuda" else None


def name(device: str) -> str | None:
    """The accelerator's name; None for the CPU, which `report.cpu_name` names."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def cache_bytes(device: str) -> int | None:
    """Size of the last cache before memory; None where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = []
    for file in _CACHES.glob("index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    if sizes:
        return max(sizes)
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or None
    return None


@cache
def _evictor(device: str) -> torch.Tensor:
    """Twice as many bytes as the last cache holds."""
    known = cache_bytes(device) or (64 << 20)
    return torch.zeros(2 * known, dtype=torch.uint8, device=device)


def evict(device: str) -> Callable[[], None]:
    """What fills the caches with other data, by all threads, so that the next call starts cold."""
    buffer = _evictor(device)

    def fill() -> None:
        buffer.add_(1)
        if device == "cuda":
            torch.cuda.synchronize()

    return fill
