"""How time grows with the image or the batch, beside what the papers' formulas say.

A sweep times one operator at a row of sizes and fits time = c x^e to the larger ones, where x is
the number of tokens of an image or the number of images. The paper's exponent is that of its MACs
over the same sizes. Where the two differ, the numbers that say why stand beside them: what a call
costs whatever its size, and how the rate falls once the operands leave the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from xattn_ops import flops
from xattn_ops.benchmarks import cases
from xattn_ops.benchmarks.cases.case import FORWARD, Maker, Variant
from xattn_ops.benchmarks.cases.shapes import CAT_SMALL
from xattn_ops.benchmarks.device import cache_bytes, wait_for
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.runner import STEP_FLOPS, Settings, run
from xattn_ops.benchmarks.timing import Timing, interleaved

SIDES = (112, 168, 224, 336, 448, 672, 896)  # pixels; whole windows of 7 at stride 4
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIDE, BATCH = OVER = ("side", "batch")
TOLERANCE = 0.15  # of an exponent
LEAST = 3  # points for an exponent
MSA = "msa"
COMPLEXITY = {  # in the tokens of an image
    MSA: "quadratic (CAT eq. 1)",
    "ipsa": "linear (CAT eq. 2)",
    "cpsa": "CAT eq. 3",
    "convrel": "linear (CoaT eq. 3, 10)",
    "convpos": "linear (CoaT 4.2)",
    "digest": "quadratic (CabViT 3.3)",
    "merge": "linear (CabViT 3.1)",
    "clsattn": "linear (CrossViT 3.3)",
}


@dataclass(frozen=True)
class Point:
    """One size: x is what the fit is over, `busy` why it takes no part."""

    size: int
    x: int
    macs: int
    bytes: int
    seconds: float
    busy: str = ""


@dataclass(frozen=True)
class Fit:
    """Exponents over the calm ones among the larger sizes, and why ours is not the paper's."""

    sizes: tuple[int, ...]
    exponent: float
    paper: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return abs(self.exponent - self.paper) <= TOLERANCE


@dataclass
class Sweep:
    """One way to compute one operator over all sizes; `fit` is None where too few were calm."""

    operator: str
    variant: str
    over: str
    dtype: str
    direction: str
    device: str
    points: list[Point] = field(default_factory=list)
    fit: Fit | None = None

    @property
    def complexity(self) -> str:
        return "linear" if self.over == BATCH else COMPLEXITY.get(self.operator, "")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "complexity": self.complexity}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sweep:
        data = {key: value for key, value in data.items() if key != "complexity"}
        points = [Point(**point) for point in data.pop("points")]
        found = data.pop("fit")
        fit = Fit(**{**found, "sizes": tuple(found["sizes"])}) if found else None
        return cls(**data, points=points, fit=fit)


Progress = Callable[[str], None]


def plan(over: Sequence[str], operators: Sequence[str]) -> list[tuple[str, str]]:
    """(operator, over) of each sweep; attention over the whole map beside those over the side."""
    swept = [name for name in operators if name in cases.SWEPT]
    return [(name, one) for one in over for name in ((MSA, *swept) if one == SIDE else swept)]


def measure(
    operator: str,
    over: str,
    dtype: torch.dtype,
    direction: str,
    settings: Settings,
    device: str = "cpu",
    sizes: Sequence[int] | None = None,
    progress: Progress = lambda _: None,
) -> list[Sweep]:
    """Time one operator at every size: a sweep for ours and one for eager PyTorch.

    sizes: sides at batch 1, or batches at side 224; None: `SIDES` or `BATCHES`.

    Raises:
        RuntimeError: a result was wrong.
    """
    settings = replace(settings, compile=False, caches=settings.caches[:1])
    sizes = sizes or (SIDES if over == SIDE else BATCHES)
    sweeps: dict[str, Sweep] = {}
    for size in sizes:
        progress(f"{operator} {over} {size} {direction}")
        side, batch = (size, 1) if over == SIDE else (224, size)
        one = _plain_attention if operator == MSA else _case
        for variant, timing, macs, nbytes, tokens in one(
            operator, side, batch, dtype, direction, settings, device
        ):
            name = str(dtype).removeprefix("torch.")
            sweep = Sweep(operator, variant, over, name, direction, device)
            x = tokens if over == SIDE else batch
            limits = settings.max_spread, settings.max_waited
            busy = timing.busy(variant, *limits)
            point = Point(size, x, macs, nbytes, timing.median, busy)
            sweeps.setdefault(variant, sweep).points.append(point)
    for sweep in sweeps.values():
        sweep.fit = fit(sweep, cache_bytes(device))
    return list(sweeps.values())


Sample = tuple[str, Timing, int, int, int]  # variant, timing, MACs, bytes, tokens of an image


def _case(
    operator: str,
    side: int,
    batch: int,
    dtype: torch.dtype,
    direction: str,
    settings: Settings,
    device: str,
) -> Iterator[Sample]:
    """Ours and eager, checked, at the first stage of an image of that side."""
    case = cases.build(operator, 0, batch, dtype, direction, device, side)
    (row,) = run(case, settings, _NoRoof())
    if row.timing is None:
        raise RuntimeError(f"{case.name}: {row.refused}")
    for name, timing in (("fused", row.timing), ("eager", row.baselines["eager"])):
        yield name, timing, row.macs, row.bytes, case.tokens


def _plain_attention(
    operator: str,
    side: int,
    batch: int,
    dtype: torch.dtype,
    direction: str,
    settings: Settings,
    device: str,
) -> Iterator[Sample]:
    """Attention over the whole map of CAT-S's first stage by torch's own kernel, for contrast."""
    stage = CAT_SMALL[0].at(side)
    tokens = stage.height * stage.width
    with torch.device(device):
        make = Maker(dtype, direction)
        shape = (batch, stage.heads, tokens, stage.channels // stage.heads)
        q, k, v = (make(*shape) for _ in range(3))
    grads = [torch.ones_like(q).detach()]
    variant = Variant(F.scaled_dot_product_attention, (q, k, v), (q, k, v))
    forward = direction == FORWARD
    call = variant.forward if forward else lambda: variant.step(grads)
    timings = interleaved(
        {"sdpa": call},
        budget=settings.budget,
        min_rounds=min(3, settings.min_rounds),  # a call takes seconds at the largest side
        warmup=1,
        wait=wait_for(device),
    )
    products = flops.msa(stage.height, stage.width, stage.channels) - 4 * tokens * stage.channels**2
    nbytes = (4 if forward else 11) * q.numel() * q.element_size()
    yield "sdpa", timings["sdpa"], batch * products, nbytes, tokens


class _NoRoof(Roofline):
    """A sweep shows rates at many sizes: the roofline of each is left out."""

    def least_seconds(self, *_: Any, **__: Any) -> float | None:
        return None


# -------------------------------------------------------------------------------------------- fit


def fit(sweep: Sweep, cache: int | None) -> Fit | None:
    """The exponents over the calm ones of the larger half of the sizes; None for fewer than 3."""
    first = max(0, min((len(sweep.points) - 1) // 2, len(sweep.points) - LEAST))
    larger = sorted(sweep.points, key=lambda point: point.x)[first:]
    calm = [point for point in larger if not point.busy]
    if len(calm) < LEAST:
        return None
    exponent = slope([point.x for point in calm], [point.seconds for point in calm])
    paper = slope([point.x for point in calm], [point.macs for point in calm])
    found = Fit(tuple(point.size for point in calm), exponent, paper)
    return found if found.agrees else replace(found, reason=_reason(sweep, calm, found, cache))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line through (log x, log y)."""
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(us) / len(us), sum(vs) / len(vs)
    products = sum((u - mean_u) * (v - mean_v) for u, v in zip(us, vs, strict=True))
    return products / sum((u - mean_u) ** 2 for u in us)


def _reason(sweep: Sweep, calm: list[Point], found: Fit, cache: int | None) -> str:
    """The numbers behind an exponent that is not the paper's."""
    first, last = calm[0], calm[-1]
    factor = 1 if sweep.direction == FORWARD else STEP_FLOPS
    rates = [2 * factor * point.macs / point.seconds / 1e9 for point in (first, last)]
    sizes = [point.bytes / (1 << 20) for point in (first, last)]
    words = (
        f"{sweep.over} {first.size} to {last.size}: {rates[0]:.0f} to {rates[1]:.0f} GFLOP/s, "
        f"operands {sizes[0]:.1f} to {sizes[1]:.1f} MiB"
    )
    if (sweep.operator, sweep.variant, sweep.over) == ("cpsa", "fused", SIDE):
        stages = [CAT_SMALL[0].at(point.size) for point in calm]
        executed = [flops.cpsa_absorbed(s.height, s.width, s.channels, s.window) for s in stages]
        growth = slope([point.x for point in calm], executed)
        words = f"the absorbed form, which the kernel executes, grows with {growth:.2f}; {words}"
    known = "" if cache is None else f" (last cache {cache / (1 << 20):.0f} MiB)"
    if found.exponent > found.paper:
        return f"{words}{known}: the rate falls as data leaves the caches"
    smallest = min(sweep.points, key=lambda point: point.x)
    return (
        f"{words}: the rate still rises, for what a call costs at any size weighs less "
        f"({smallest.seconds * 1e6:.0f} us at {sweep.over} {smallest.size})"
    )
