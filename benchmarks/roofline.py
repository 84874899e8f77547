"""What this machine can do at most, measured: matrix-product peak and copy bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from xattn_ops.benchmarks.device import cache_bytes, wait_for
from xattn_ops.benchmarks.timing import MAX_WAITED, queued_seconds

_SIDE = 1536  # large enough to reach the peak, 30 ms a product on two cores
_CUDA_SIDE = 8192  # likewise, on a GPU
_LEAST_COPY = 1 << 16  # below that a copy measures the call, not the memory


@dataclass
class Roofline:
    """Peak FLOP/s per dtype and bandwidth per footprint of this process's threads, measured once.

    Bandwidth is that of a copy which moves as many bytes (read + written) as the case at hand, up
    to a power of two: a map that lives in the cache is held against the cache.
    """

    seconds: float = 0.15
    device: str = "cpu"
    _flops: dict[torch.dtype, float] = field(default_factory=dict)
    _bandwidth: dict[int, float] = field(default_factory=dict)

    def flops(self, dtype: torch.dtype) -> float | None:
        """Best FLOP/s of a large linear, over F.linear and oneDNN's own; None if busy."""
        if dtype not in self._flops:
            value = _when_calm(lambda: _peak_flops(dtype, self.seconds, self.device))
            if value is None:
                return None
            self._flops[dtype] = value
        return self._flops[dtype]

    def bandwidth(self, nbytes: int) -> float | None:
        """Bytes/s of a copy that reads and writes `nbytes` in all; None if the machine is busy."""
        size = max(_LEAST_COPY, 1 << max(nbytes - 1, 1).bit_length())
        if size not in self._bandwidth:
            value = _when_calm(lambda: _copy_bandwidth(size, self.seconds, self.device))
            if value is None:
                return None
            self._bandwidth[size] = value
        return self._bandwidth[size]

    def least_seconds(
        self, flops: int, nbytes: int, dtype: torch.dtype, *, cold: bool = False
    ) -> float | None:
        """The roofline's bound: no faster than the arithmetic, no faster than the traffic.

        cold: all of the traffic comes from memory, whatever its size. None where the machine was
        too busy to measure either; the next call tries again.
        """
        footprint = max(nbytes, 4 * (cache_bytes(self.device) or 0)) if cold else nbytes
        peak, bandwidth = self.flops(dtype), self.bandwidth(footprint)
        if peak is None or bandwidth is None:
            return None
        return max(flops / peak, nbytes / bandwidth)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {
            "gflops": {str(k).removeprefix("torch."): v / 1e9 for k, v in self._flops.items()},
            "copy_gbps_by_bytes": {str(k): v / 1e9 for k, v in sorted(self._bandwidth.items())},
        }


def _when_calm(measure: Callable[[], float]) -> float | None:
    """The measurement, unless this process waited for a core while it ran."""
    started, queued = time.perf_counter(), queued_seconds()
    value = measure()
    waited = (queued_seconds() - queued) / (time.perf_counter() - started)
    return value if waited <= MAX_WAITED else None


def _peak_flops(dtype: torch.dtype, seconds: float, device: str) -> float:
    """Of the best linear; where float32 is faster than a short format, that counts for it too."""
    own = _linear_flops(dtype, seconds, device)
    short = device == "cpu" and dtype.itemsize == 2
    return max(own, _linear_flops(torch.float32, seconds, device)) if short else own


def _linear_flops(dtype: torch.dtype, seconds: float, device: str) -> float:
    side = _SIDE if device == "cpu" else _CUDA_SIDE
    a = torch.randn(side, side, device=device).to(dtype)
    weight = torch.randn(side, side, device=device).to(dtype)
    best = _fastest(lambda: F.linear(a, weight), seconds, device)
    pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if pointwise is not None and device == "cpu":
        with suppress(RuntimeError):  # no oneDNN, or not for this dtype: F.linear's figure stands
            onednn = _fastest(lambda: pointwise(a, weight, None, "none", [], ""), seconds, device)
            best = min(best, onednn)
    return 2 * side**3 / best


def _copy_bandwidth(nbytes: int, seconds: float, device: str) -> float:
    source = torch.ones(nbytes // 8, device=device)  # float32: half of the traffic is the read
    target = torch.empty_like(source)
    return nbytes / _fastest(lambda: target.copy_(source), seconds, device)


def _fastest(run: Callable[[], object], seconds: float, device: str) -> float:
    wait = wait_for(device) or (lambda: None)
    run()
    wait()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - before)
    return best
