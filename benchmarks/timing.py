"""Interleaved timing: every variant runs in every round, so a busy moment hits all alike."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], object]
MAX_SPREAD = 0.25  # interquartile range over the median
MAX_WAITED = 0.10  # share of the time that our threads stood in the queue for a core
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant over all rounds."""

    median: float
    fastest: float
    iqr: float
    rounds: int
    calls_per_round: int
    threads: int
    waited: float = 0.0  # share of the whole measurement that our threads waited for a core

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.05 is a quiet machine, 0.3 a busy one."""
        return self.iqr / self.median if self.median else float("inf")

    def busy(
        self, name: str, max_spread: float = MAX_SPREAD, max_waited: float = MAX_WAITED
    ) -> str:
        """Why this measurement of `name` cannot be compared with another; "" where it can."""
        if self.waited > max_waited:
            return (
                f"machine busy: our threads waited for a core {self.waited:.0%} of the time, "
                f"limit {max_waited:.0%}"
            )
        if self.spread > max_spread:
            return f"machine busy: spread of {name} is {self.spread:.0%}, limit {max_spread:.0%}"
        return ""

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "spread": self.spread}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        return cls(**{key: value for key, value in data.items() if key != "spread"})

    @classmethod
    def from_samples(
        cls, samples: list[float], calls_per_round: int, waited: float = 0.0
    ) -> Timing:
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(
            median=median(samples),
            fastest=min(samples),
            iqr=high - low,
            rounds=len(samples),
            calls_per_round=calls_per_round,
            threads=torch.get_num_threads(),
            waited=waited,
        )


def steady_heap() -> bool:
    """Have malloc keep what is freed, for the rest of this process; True where that worked (glibc).

    By default glibc maps tensors of tens of MB afresh on every call, or not, as the heap lies: page
    faults were two fifths of the CPU time of eager IPSA at 56x56. A user has them, so by default
    the benchmark does; with the heap kept it shows what the kernels alone are worth.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    no_mmap, no_trim = mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(no_mmap and no_trim)


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with that many intra-op threads (None: as set), and give back what was there."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def interleaved(
    variants: Mapping[str, Call],
    *,
    budget: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    sample_seconds: float = 2e-3,
    warmup: int = 3,
    before: Call | None = None,
    wait: Call | None = None,
) -> dict[str, Timing]:
    """Time the variants against each other, round by round.

    All variants are warmed up first. A sample repeats a short call until it lasts `sample_seconds`.
    See `steady_heap` for tensors of tens of MB.

    Args:
        variants: name -> call without arguments.
        budget: seconds for the timed rounds, all variants together.
        min_rounds, max_rounds: bounds on the number of rounds whatever the budget.
        sample_seconds: least duration of one sample.
        warmup: calls of each variant before the first round.
        before: runs before each sample, untimed; a sample is then one call. See `device.evict`.
        wait: returns when what a call launched is done; None where calls wait themselves.

    Returns:
        name -> :class:`Timing`, in the order given.

    Raises:
        ValueError: `variants` is empty, or fewer than two rounds are asked for.
    """
    if not variants:
        raise ValueError("variants must name at least one call to time")
    if min_rounds < 2 or max_rounds < min_rounds:
        raise ValueError(
            f"need 2 <= min_rounds <= max_rounds, got min_rounds={min_rounds}, "
            f"max_rounds={max_rounds}"
        )
    samplers = {name: _Sampler(run, before, wait) for name, run in variants.items()}
    for sampler in samplers.values():
        sampler.warm_up(warmup, 0.0 if before else sample_seconds)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with _without_gc():
        started, queued = time.perf_counter(), queued_seconds()
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() - started > budget:
                break
            for name, sampler in samplers.items():
                samples[name].append(sampler.sample())
        waited = max(0.0, queued_seconds() - queued) / (time.perf_counter() - started)
    return {
        name: Timing.from_samples(samples[name], sampler.calls, waited)
        for name, sampler in samplers.items()
    }


@dataclass
class _Sampler:
    """One variant: how it is called, and how often in a sample."""

    run: Call
    before: Call | None
    wait: Call | None
    calls: int = 1

    def warm_up(self, times: int, sample_seconds: float) -> None:
        once = min(self.sample() for _ in range(max(1, times)))
        self.calls = max(1, min(1000, round(sample_seconds / max(once, 1e-9))))

    def sample(self) -> float:
        """Seconds of a call, on average over a sample."""
        if self.before is not None:
            self.before()
        started = time.perf_counter()
        for _ in range(self.calls):
            self.run()
        if self.wait is not None:
            self.wait()
        return (time.perf_counter() - started) / self.calls


def queued_seconds() -> float:
    """How long the threads of this process have waited for a core so far; 0 where Linux is not.

    A neighbour that never rests makes every sample equally slow: the spread would not show it.
    """
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread may end while we look
            total += int(task.read_text().split()[1])
    return total / 1e9


@contextmanager
def _without_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
