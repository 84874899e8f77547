"""The PNGs of the demo. matplotlib's object interface alone: no global state, no display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from xattn_ops.demo.measure import Captured, Measured
from xattn_ops.demo.photo import Photo
from xattn_ops.models.cabvit import AttentionMaps
from xattn_ops.models.cabvit_blocks import STRIDE

INK, OURS, PLAIN, MARK = "#22303c", "#0b7a75", "#b0b7bf", "#ff3b6b"
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the photo
HEAT = "RdBu_r"  # red above an even share, blue below
SMALL: dict[str, Any] = {"fontsize": 8, "color": INK, "pad": 3}
NAMES = {
    "ipsa": "IPSA with its linears",
    "cpsa": "CPSA",
    "convrel": "Conv-relative attention with its linears",
    "convpos": "Conv position encoding",
    "clsattn": "CLS cross attention with its linears",
    "digest": "Digest attention with its linears",
}


def feature_maps(
    photo: Photo, features: Sequence[Tensor], path: Path, title: str, row_name: str = "stage"
) -> None:
    """One row a stage: three principal components as colours, then the channels that vary most.

    Args:
        features: the stages' outputs, each [1, C, H, W].
        row_name: what a row is, if not a stage.
    """
    channels = 5
    figure = _figure(2 * (channels + 2), 2.15 * len(features) + 0.5, title)
    grid = figure.subplots(len(features), channels + 2, squeeze=False)
    for stage, (row, maps) in enumerate(zip(grid, features, strict=True), start=1):
        one = maps[0].float()
        strongest = one.flatten(1).var(1).topk(channels).indices.sort().values.tolist()
        _picture(row[0], photo.pixels if stage == 1 else _at(photo, one.shape[1:]))
        _picture(row[1], principal_colours(one))
        for axis, channel in zip(row[2:], strongest, strict=True):
            _picture(axis, one[channel].numpy(), cmap="viridis")
            axis.set_title(f"channel {channel}", **SMALL)
        row[0].set_ylabel(f"{row_name} {stage}", fontsize=11, color=INK)
        row[1].set_title(f"{one.shape[0]} channels as RGB", **SMALL)
        if stage > 1:
            row[0].set_title(
                f"photo at {one.shape[1]} x {one.shape[2]}", fontsize=8, color=INK, pad=3
            )
    _save(figure, path)


def principal_colours(maps: Tensor) -> np.ndarray:
    """[C, H, W] -> [H, W, 3] in [0, 1]: the first three principal components over the pixels."""
    _, height, width = maps.shape
    pixels = maps.flatten(1).T.double()
    pixels = pixels - pixels.mean(0)
    left, values, _ = torch.linalg.svd(pixels, full_matrices=False)
    scores = F.pad(left[:, :3] * values[:3], (0, max(0, 3 - len(values))))
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    colours = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.view(height, width, -1).numpy()


def inner_patch_attention_maps(
    photo: Photo, captured: Sequence[Captured], point: tuple[float, float], path: Path, title: str
) -> None:
    """One row a stage: the photo with the window around `point`, then each head's weights in it.

    Args:
        captured: the IPSA modules to show.
        point: (y, x) of the chosen pixel, as fractions of the photo.
    """
    heads = 4
    figure = _figure(2.2 * (heads + 1) + 0.6, 2.35 * len(captured) + 0.5, title)
    grid = figure.subplots(len(captured), heads + 1, squeeze=False)
    for row, one in zip(grid, captured, strict=True):
        weights = one.weights()[0]  # [gh, gw, heads, N, N]
        rows, columns = one.window
        y, x = _element(point, one.x.shape[1:3])
        window = weights[y // rows, x // columns]
        query = (y % rows) * columns + x % columns
        box = _box(photo, one, (y // rows * rows, x // columns * columns), (rows, columns))
        _picture(row[0], photo.pixels)
        row[0].add_patch(_outline(box))
        row[0].set_ylabel(f"stage {one.stage}", fontsize=11, color=INK)
        row[0].set_title(f"window in {one.shape}", **SMALL)
        for head, axis in enumerate(row[1:]):
            if head >= window.shape[0]:
                axis.set_axis_off()
                continue
            heat = window[head, query].view(rows, columns).numpy()
            _shares(axis, photo, heat, box)
            _mark(axis, box, (y % rows, x % columns), (rows, columns))
            axis.set_title(_range(f"head {head}", heat), **SMALL)
    _save(figure, path)


def cross_patch_attention_maps(
    photo: Photo, captured: Sequence[Captured], point: tuple[float, float], path: Path, title: str
) -> None:
    """One row a stage: the photo with the patch at `point`, then whom it looks at in the map.

    The mean over all channels comes first, then the channels whose attention is least even.
    """
    channels = 4
    figure = _figure(2.2 * (channels + 2), 2.35 * len(captured) + 0.5, title)
    grid = figure.subplots(len(captured), channels + 2, squeeze=False)
    whole = (0.0, 0.0, float(photo.size), float(photo.size))
    for row, one in zip(grid, captured, strict=True):
        rows, columns = one.window
        gh, gw = -(-one.x.shape[1] // rows), -(-one.x.shape[2] // columns)
        y, x = _element(point, one.x.shape[1:3])
        py, px = y // rows, x // columns
        looks = one.weights()[0, :, py * gw + px]  # [C, T]
        box = _box(photo, one, (py * rows, px * columns), (rows, columns))
        _picture(row[0], photo.pixels)
        row[0].add_patch(_outline(box))
        row[0].set_ylabel(f"stage {one.stage}", fontsize=11, color=INK)
        row[0].set_title(f"{gh} x {gw} patches", **SMALL)
        uneven = looks.amax(1).topk(channels).indices.sort().values.tolist()
        panels = [("mean", looks.mean(0))] + [(f"channel {c}", looks[c]) for c in uneven]
        for axis, (name, heat) in zip(row[1:], panels, strict=True):
            _shares(axis, photo, heat.view(gh, gw).numpy(), whole)
            axis.add_patch(_outline(box))
            axis.set_title(_range(name, heat.numpy()), **SMALL)
    _save(figure, path)


def cls_attention_maps(
    photo: Photo, maps: Sequence[tuple[str, Tensor]], path: Path, title: str
) -> None:
    """One row a block: the photo, the mean over its heads, then the heads that vary most.

    Args:
        maps: what a row is called, and how much CLS takes of each place, [heads, H, W].
    """
    heads = 4
    figure = _figure(2.2 * (heads + 2), 2.35 * len(maps) + 0.5, title)
    whole = (0.0, 0.0, float(photo.size), float(photo.size))
    grid = figure.subplots(len(maps), heads + 2, squeeze=False)
    for row, (name, taken) in zip(grid, maps, strict=True):
        shown = min(heads, taken.shape[0])
        strongest = taken.flatten(1).std(1).topk(shown).indices.sort().values.tolist()
        _picture(row[0], _at(photo, taken.shape[1:]))
        row[0].set_ylabel(name, fontsize=11, color=INK)
        row[0].set_title(f"photo at {taken.shape[1]} x {taken.shape[2]}", **SMALL)
        panels = [("mean", taken.mean(0))] + [(f"head {h}", taken[h]) for h in strongest]
        for axis in row[1 + len(panels) :]:
            axis.set_axis_off()
        for axis, (label, one) in zip(row[1:], panels, strict=False):
            off = (one - one.mean()).numpy()  # entries may all be negative
            limit = max(float(np.abs(off).max()), 1e-9)
            _overlay(axis, photo, off, limit, whole)
            axis.set_title(_range(label, one.numpy()), **SMALL)
    _save(figure, path)


def digest_attention_maps(
    photo: Photo,
    maps: Sequence[tuple[str, AttentionMaps]],
    point: tuple[float, float],
    path: Path,
    title: str,
) -> None:
    """One row a block: all its weights, then what the token at `point` takes, over the photo.

    All means over the heads: as a matrix with the digests framed, as in the paper; of the tokens;
    of the digests of earlier blocks, those of the latest where there are many.
    """
    most = 5
    figure = _figure(2.2 * (most + 3), 2.35 * len(maps) + 0.5, title)
    whole = (0.0, 0.0, float(photo.size), float(photo.size))
    grid = figure.subplots(len(maps), most + 3, squeeze=False)
    for row, (name, (tokens, digests)) in zip(grid, maps, strict=True):
        gh, gw = tokens.shape[2:4]
        weights = torch.cat([tokens.flatten(4), digests.flatten(4)], -1)[0].mean(0)
        share = (weights * weights.shape[-1]).clamp_min(1e-6).log2()  # [gh, gw, N + M]
        y, x = _element(point, tokens.shape[2:4])
        looks = share[y, x]
        limit = max(looks.abs().max().item(), 1e-3)
        _picture(row[0], _at(photo, tokens.shape[2:4]))
        row[0].add_patch(_outline((x - 0.5, y - 0.5, x + 0.5, y + 0.5)))
        row[0].set_ylabel(name, fontsize=11, color=INK)
        row[0].set_title(f"photo at {gh} x {gw}", **SMALL)
        _picture(row[1], share.flatten(0, 1).numpy(), cmap=HEAT, aspect="auto")
        row[1].images[0].set_clim(-share.abs().max().item(), share.abs().max().item())
        row[1].add_patch(_outline((gh * gw - 0.5, -0.5, share.shape[-1] - 0.5, gh * gw - 0.5)))
        taken = weights[..., gh * gw :].sum(-1).mean().item()
        row[1].set_title(f"all weights, {taken:.0%} on digests", **SMALL)
        earlier = looks[gh * gw :].view(digests.shape[4:])
        panels = [("tokens", looks[: gh * gw].view(gh, gw), whole)]
        for k, one in list(enumerate(earlier))[-most:]:
            panels.append((f"digests of {k}", one, _cells(photo, (gh, gw), one.shape)))
        for axis, (label, one, place) in zip(row[2:], panels, strict=False):
            _overlay(axis, photo, one.numpy(), limit, whole, place)
            low, high = one.exp2().min(), one.exp2().max()
            axis.set_title(f"{label}: {low:.2f} to {high:.2f} x even", **SMALL)
        for axis in row[2 + len(panels) :]:
            axis.set_axis_off()
    _save(figure, path)


def latency_bars(measured: Sequence[Measured], path: Path, title: str) -> None:
    """Two bars a stage and operator, and over ours how many times faster it is."""
    operators = list(dict.fromkeys(one.captured.operator for one in measured))
    figure = _figure(4.8 * len(operators), 3.8, title)
    axes = figure.subplots(1, len(operators), squeeze=False)[0]
    for axis, operator in zip(axes, operators, strict=True):
        rows = [one for one in measured if one.captured.operator == operator]
        ticks = np.arange(len(rows))
        ours = [row.fused.median * 1e3 for row in rows]
        eager = [row.eager.median * 1e3 for row in rows]
        axis.bar(ticks - 0.2, eager, 0.38, color=PLAIN, label="eager PyTorch")
        axis.bar(ticks + 0.2, ours, 0.38, color=OURS, label="xattn_ops")
        bold = {"fontsize": 9, "color": OURS, "fontweight": "bold"}
        for tick, row, height in zip(ticks, rows, ours, strict=True):
            axis.annotate(row.faster, (tick + 0.2, height), ha="center", va="bottom", **bold)
        axis.set_xticks(ticks, [row.captured.shape for row in rows], fontsize=8)
        axis.set_title(NAMES[operator], color=INK)
        axis.set_ylabel("ms per call")
        axis.set_ylim(0, 1.12 * max(ours + eager))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _picture(axis: Any, values: np.ndarray, **options: Any) -> None:
    axis.imshow(values, **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _at(photo: Photo, size: torch.Size) -> np.ndarray:
    """The photo averaged down to a map's size."""
    pixels = torch.from_numpy(photo.pixels).permute(2, 0, 1)[None]
    return F.adaptive_avg_pool2d(pixels, (size[0], size[1]))[0].permute(1, 2, 0).numpy()


def _overlay(
    axis: Any,
    photo: Photo,
    heat: np.ndarray,
    limit: float,
    box: Box,
    place: Box | None = None,
) -> None:
    """The photo in grey, cut to `box` (left, top, right, bottom), under heat in [-limit, limit].

    Each panel has its own range, which its title gives: attention may be nearly even.

    Args:
        place: where the heat lies; None: all over the box.
    """
    grey = photo.pixels.mean(2)
    _picture(axis, grey, cmap="gray", vmin=0, vmax=1, extent=(0, photo.size, photo.size, 0))
    left, top, right, bottom = place or box
    axis.imshow(
        heat, cmap=HEAT, alpha=0.6, extent=(left, right, bottom, top), vmin=-limit, vmax=limit
    )
    left, top, right, bottom = box
    axis.set(xlim=(left, right), ylim=(bottom, top))


def _cells(photo: Photo, grid: tuple[int, int], digests: torch.Size) -> Box:
    """Where the digests of a grid of tokens lie, each in a cell around the token it is made at."""
    step_y, step_x = photo.size / grid[0], photo.size / grid[1]
    left, top = (0.5 - STRIDE / 2) * step_x, (0.5 - STRIDE / 2) * step_y
    return left, top, left + STRIDE * digests[1] * step_x, top + STRIDE * digests[0] * step_y


def _shares(axis: Any, photo: Photo, heat: np.ndarray, box: Box) -> None:
    """The overlay of log2 of weight to even."""
    share = np.log2(np.maximum(heat * heat.size, 1e-6))
    _overlay(axis, photo, share, max(float(np.abs(share).max()), 1e-3), box)


def _element(point: tuple[float, float], size: torch.Size) -> tuple[int, int]:
    """Fractions of the photo -> row and column of a map."""
    return (
        min(int(point[0] * size[0]), size[0] - 1),
        min(int(point[1] * size[1]), size[1] - 1),
    )


def _box(photo: Photo, one: Captured, start: tuple[int, int], size: tuple[int, int]) -> Box:
    """Left, top, right, bottom in pixels of the photo of a piece of a feature map."""
    step_y, step_x = photo.size / one.x.shape[1], photo.size / one.x.shape[2]
    (top, left), (rows, columns) = start, size
    return left * step_x, top * step_y, (left + columns) * step_x, (top + rows) * step_y


def _outline(box: Box) -> Rectangle:
    left, top, right, bottom = box
    return Rectangle((left, top), right - left, bottom - top, fill=False, ec=MARK, lw=1.8)


def _mark(
    axis: Any,
    box: Box,
    place: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Outline the chosen pixel within the window."""
    left, top, right, bottom = box
    width, height = (right - left) / size[1], (bottom - top) / size[0]
    corner = (left + place[1] * width, top + place[0] * height)
    axis.add_patch(Rectangle(corner, width, height, fill=False, ec=MARK, lw=1.8))


def _range(name: str, heat: np.ndarray) -> str:
    """The range of the weights, in units of an even share."""
    share = heat * heat.size
    return f"{name}: {share.min():.2f} to {share.max():.2f} x even"
