"""Images a second of whole models, beside what the papers measured on their machines.

CrossViT's Table 4 gives images/s of a V100 at batch 64; CabViT's section 4.4 frames/s without
batching. Ours is set against the official formulation of the same model in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.device import wait_for
from xattn_ops.benchmarks.runner import Settings, compare
from xattn_ops.benchmarks.timing import Timing, interleaved
from xattn_ops.models import create_model, list_models
from xattn_ops.papers import PAPERS
from xattn_ops.papers.measure import available, measure, side_of
from xattn_ops.papers.table import Cell, Row


@dataclass(frozen=True)
class Rate:
    """One model at one batch; `refused` says why there is no ratio."""

    model: str
    side: int
    batch: int
    dtype: str
    device: str
    params: int
    macs: int
    ours: Timing
    plain: Timing
    refused: str = ""
    printed: int | None = None  # images/s of the paper

    @property
    def images(self) -> float:
        """Images a second."""
        return self.batch / self.ours.median

    @property
    def plain_images(self) -> float:
        return self.batch / self.plain.median

    @property
    def ratio(self) -> float | None:
        return None if self.refused else self.plain.median / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        figures = {"images": self.images, "plain_images": self.plain_images, "ratio": self.ratio}
        return {**asdict(self), **figures}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rate:
        data = {k: v for k, v in data.items() if k not in ("images", "plain_images", "ratio")}
        timings = {name: Timing.from_dict(data[name]) for name in ("ours", "plain")}
        return cls(**{**data, **timings})


def paper_models() -> list[str]:
    """Every model of the papers' tables that this version has, by its own options, in order."""
    rows = [row for paper in PAPERS for row in paper.rows if available(row) and not row.options]
    return list(dict.fromkeys(row.model for row in rows))


def check_models(names: Sequence[str]) -> None:
    """Raise ValueError for a model that is not there."""
    for name in names:
        if name not in list_models():
            raise ValueError(f"no model {name!r}; there are {', '.join(list_models())}")


def rate(
    name: str, batch: int, dtype: torch.dtype, settings: Settings, device: str = "cpu"
) -> Rate:
    """Time a model's inference against its official formulation in plain PyTorch.

    Raises:
        RuntimeError: the two differ by more than their dtype explains.
    """
    side = side_of(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = create_model(name).eval().to(dtype)
        images = torch.randn(batch, 3, side, side, dtype=dtype)
    plain = baselines.plain_copy(model)
    for module in plain.modules():  # operators without a plain module of their own
        if getattr(module, "backend", "reference") is None:
            module.backend = "reference"  # type: ignore[assignment]
    _check(name, model, plain, images[:1])

    def ours() -> None:
        with torch.no_grad():
            model(images)

    def official() -> None:
        with torch.no_grad(), baselines.plain_linears():
            plain(images)

    timings = interleaved(
        {"ours": ours, "plain": official},
        budget=settings.budget,
        min_rounds=settings.min_rounds,
        warmup=1,
        wait=wait_for(device),
    )
    limits = settings.max_spread, settings.max_waited
    counted = measure(Row("", "", name, Cell(None), Cell(None), side=side))
    return Rate(
        model=name,
        side=side,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        params=counted.params,
        macs=counted.macs,
        ours=timings["ours"],
        plain=timings["plain"],
        refused=next(filter(None, (t.busy(n, *limits) for n, t in timings.items())), ""),
        printed=_printed(name),
    )


def _check(name: str, model: nn.Module, plain: nn.Module, image: torch.Tensor) -> None:
    """One image through both, against float64."""
    exact = baselines.plain_copy(plain).double()
    with torch.no_grad(), baselines.plain_linears():
        results = [exact(image.double())], [plain(image)]
    with torch.no_grad():
        check = compare([model(image)], results[1], results[0])
    if not check.passed:
        raise RuntimeError(
            f"{name}: output is off by {check.error:.3g}, allowed {check.allowed:.3g}"
        )


def _printed(name: str) -> int | None:
    rows = [row for paper in PAPERS for row in paper.rows if row.model == name and not row.options]
    return next((row.throughput for row in rows if row.throughput), None)
