"""Runs cases: the correctness gate, then the interleaved timing, then the ratios, or why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xattn_ops.benchmarks.cases import FORWARD, Case, Variant
from xattn_ops.benchmarks.device import evict, wait_for
from xattn_ops.benchmarks.options import CACHES
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.timing import MAX_SPREAD, MAX_WAITED, Timing, interleaved

WARM, COLD = CACHES
FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0  # times the same-dtype eager formulation's error
FLOOR = 4.0  # units of the dtype's eps at the largest value: a rounding or two is free
STEP_FLOPS = 3  # a step is the forward and two products for each of its products

Results = tuple[Tensor, ...]  # of a case: its outputs, and in a step the gradients of its leaves


@dataclass(frozen=True)
class Check:
    """Largest errors against float64, ours and the plain formulation's, of the worst tensor."""

    tensor: str
    error: float
    plain_error: float
    allowed: float
    passed: bool


@dataclass
class Row:
    """One measured case; `refused` says why it has no ratios."""

    operator: str
    shape: str
    batch: int
    dtype: str
    direction: str
    variant: str
    check: Check
    device: str = "cpu"
    cache: str = WARM
    macs: int = 0  # of the paper's algorithm, forward, whole batch
    bytes: int = 0  # read and written at least
    timing: Timing | None = None
    baselines: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    gflops: float = 0.0
    gbps: float = 0.0
    roofline_share: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    best: str = ""
    best_ratio: float | None = None
    refused: str = ""
    apart: tuple[str, ...] = ()  # baselines that do not count for the best

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows of different runs comparable."""
        kind = (self.operator, self.shape, self.batch, self.dtype, self.direction, self.variant)
        return (*kind, self.device, self.cache)

    @property
    def label(self) -> str:
        """The case in words, less dtype and direction."""
        words = [self.operator, self.shape]
        words += [self.variant] * (self.variant != "fused") + [self.cache] * (self.cache != WARM)
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        timings = {name: timing.to_dict() for name, timing in self.baselines.items()}
        own = self.timing.to_dict() if self.timing else None
        return {**asdict(self), "timing": own, "baselines": timings}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """A row of a file, also of one from before rows had a device, a cache and MACs."""
        timing = Timing.from_dict(data["timing"]) if data["timing"] else None
        baselines = {name: Timing.from_dict(one) for name, one in data["baselines"].items()}
        read = {"check": Check(**data["check"]), "timing": timing, "baselines": baselines}
        row = cls(**{**data, **read})
        if not row.macs and timing:
            steps = 1 if row.direction == FORWARD else STEP_FLOPS
            row.macs = round(row.gflops * 1e9 * timing.median / 2 / steps)
            row.bytes = round(row.gbps * 1e9 * timing.median)
        return row


@dataclass(frozen=True)
class Settings:
    """How long to measure, and how noisy a measurement may be."""

    budget: float = 2.0
    min_rounds: int = 7
    max_spread: float = MAX_SPREAD
    max_waited: float = MAX_WAITED
    compile: bool = True
    caches: tuple[str, ...] = (WARM,)


def run(case: Case, settings: Settings, roofline: Roofline) -> list[Row]:
    """Check and time one case.

    Returns:
        A row for each of our variants and of `settings.caches`: warm, where operands lie in the
        cache as far as they fit, and cold, where other data lies there before every call. Where
        the check fails nothing is timed; where the machine was busy (samples spread wider than
        `settings.max_spread`, or threads waited for a core longer than `settings.max_waited`)
        times are given and ratios are not.
    """
    torch.compiler.reset()  # shapes of the last case must not make this one dynamic
    grads, expected, eager = _expected(case)
    skipped: dict[str, str] = {}
    rows = _checked(case, grads, expected, eager, settings, skipped)
    passed = [row.variant for row in rows if row.check.passed]
    if next(iter(case.ours)) not in passed:
        return rows
    ours = {name: _call(case.ours[name], case, grads) for name in passed}
    plain = _running(case, grads, settings, skipped)
    done: list[Row] = []
    for cache in settings.caches:
        timings = interleaved(
            {**ours, **plain},
            budget=settings.budget,
            min_rounds=settings.min_rounds,
            before=evict(case.device) if cache == COLD else None,
            wait=wait_for(case.device),
        )
        for row in rows:
            row = replace(row, cache=cache, skipped=skipped, ratios={})
            done.append(row)
            if row.variant in ours:
                row.timing = timings[row.variant]
                row.baselines = {name: timings[name] for name in plain}
                _rate(row, case, expected[: len(grads)], roofline)
                _judge(row, settings)
    return done


def _checked(
    case: Case,
    grads: Results,
    expected: Results,
    eager: Results,
    settings: Settings,
    skipped: dict[str, str],
) -> list[Row]:
    """A row with its check for each of our variants that runs; the others go to `skipped`."""
    rows = []
    main = next(iter(case.ours))
    for name, variant in case.ours.items():
        if name != main and not settings.compile:
            continue
        try:  # a compiled variant owes what the compiled plain formulation does
            same = eager if name == main else _results(case.plain["compile"], case, grads)
            check = compare(_results(variant, case, grads), same, expected, len(grads))
            rows.append(_row(case, name, check))
        except Exception as error:  # a compiler that is not there; our own kernel has no excuse
            if name == main:
                raise
            skipped[name] = _first_line(error)
    return rows


def _running(
    case: Case, grads: Results, settings: Settings, skipped: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """The plain formulations that run; the others go to `skipped`."""
    plain = {}
    for name, variant in case.baselines().items():
        if not settings.compile and ("compile" in name or name == "flex"):
            skipped[name] = "left out"
            continue
        run_once = _call(variant, case, grads)
        try:
            run_once()
        except Exception as error:  # the baseline's own limits are a finding, not a failure
            skipped[name] = _first_line(error)
            continue
        plain[name] = run_once
    return plain


def compare(
    results: Sequence[Tensor], plain: Sequence[Tensor], expected: Sequence[Tensor], outputs: int = 1
) -> Check:
    """Ours against float64, in units of what the same-dtype plain formulation loses.

    outputs: how many come before the gradients.

    Returns:
        The check of the tensor that comes nearest to its limit, or is furthest beyond it.
    """
    worst: tuple[float, Check] | None = None
    for i, (ours, same, exact) in enumerate(zip(results, plain, expected, strict=True)):
        scale = exact.abs().max().item() if exact.numel() else 0.0
        factor = FORWARD_FACTOR if i < outputs else GRADIENT_FACTOR
        plain_error = _max_error(same, exact)
        allowed = factor * plain_error + FLOOR * torch.finfo(ours.dtype).eps * scale
        error = _max_error(ours, exact)
        passed = ours.shape == exact.shape and error <= allowed  # NaN fails
        share = error / allowed if passed and allowed else (0.0 if passed else float("inf"))
        number = "" if outputs == 1 else f" {i}"
        name = f"output{number}" if i < outputs else f"gradient {i - outputs}"
        if worst is None or share > worst[0]:
            worst = share, Check(name, error, plain_error, allowed, passed)
    assert worst is not None
    return worst[1]


def _expected(case: Case) -> tuple[Results, Results, Results]:
    """Gradients to feed in, float64 results, eager results of the case's dtype."""
    generator = torch.Generator().manual_seed(1)
    grads = tuple(
        torch.randn(out.shape, generator=generator).to(out.device, case.dtype)
        for out in case.oracle.forward()
    )
    exact = _results(case.oracle, case, tuple(grad.double() for grad in grads))
    return grads, exact, _results(next(iter(case.plain.values())), case, grads)


def _results(variant: Variant, case: Case, grads: Results) -> Results:
    return variant.forward() if case.direction == FORWARD else variant.step(grads)


def _call(variant: Variant, case: Case, grads: Results) -> Callable[[], object]:
    if case.direction == FORWARD:
        return variant.forward
    return lambda: variant.step(grads)


def _row(case: Case, variant: str, check: Check) -> Row:
    row = Row(
        operator=case.operator,
        shape=case.shape,
        batch=case.batch,
        dtype=str(case.dtype).removeprefix("torch."),
        direction=case.direction,
        variant=variant,
        check=check,
        apart=case.apart,
        device=case.device,
        macs=case.macs,
    )
    if not check.passed:
        row.refused = (
            f"wrong result: {check.tensor} is off by {check.error:.3g}, allowed {check.allowed:.3g}"
        )
    return row


def _rate(row: Row, case: Case, outputs: Results, roofline: Roofline) -> None:
    assert row.timing is not None
    leaves = sum(t.numel() for t in next(iter(case.ours.values())).leaves) * case.dtype.itemsize
    output = sum(out.numel() for out in outputs) * case.dtype.itemsize
    if case.direction == FORWARD:
        operations, traffic = 2 * case.macs, leaves + output
    else:  # the leaves are read twice and their gradients written; the output written, its read
        operations, traffic = 2 * STEP_FLOPS * case.macs, 3 * leaves + 2 * output
    row.bytes = traffic
    row.gflops = operations / row.timing.median / 1e9
    row.gbps = traffic / row.timing.median / 1e9
    least = roofline.least_seconds(operations, traffic, case.dtype, cold=row.cache == COLD)
    row.roofline_share = None if least is None else least / row.timing.median


def _judge(row: Row, settings: Settings) -> None:
    """Ratios to the baselines, unless the machine was too busy to say."""
    assert row.timing is not None
    limits = settings.max_spread, settings.max_waited
    usual = {name: timing for name, timing in row.baselines.items() if name not in row.apart}
    if not usual:
        row.refused = "no baseline ran"
        return
    row.refused = row.timing.busy(row.variant, *limits)
    if row.refused:
        return
    for name, timing in row.baselines.items():
        if not timing.busy(name, *limits):
            row.ratios[name] = timing.median / row.timing.median
    best = min(usual, key=lambda name: usual[name].median)
    for name, timing in usual.items():
        # a restless one might have been the best on a calm machine
        if timing.fastest <= usual[best].median and name not in row.ratios:
            row.refused = timing.busy(name, *limits)
            return
    row.best, row.best_ratio = best, row.ratios[best]


def _max_error(values: Tensor, exact: Tensor) -> float:
    if values.shape != exact.shape:
        return float("inf")
    return (values.detach().double() - exact).abs().max().item() if exact.numel() else 0.0


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
