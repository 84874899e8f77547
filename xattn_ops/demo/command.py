"""The order of the demo, and what it prints."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from xattn_ops import _library
from xattn_ops.benchmarks.timing import thread_count
from xattn_ops.demo import measure, photo, pictures
from xattn_ops.models import create_model, list_models, load_official
from xattn_ops.models.cabvit import AttentionMaps, CabViT, PlainCabViT, attention_maps
from xattn_ops.models.coat import SCALES, CoaT
from xattn_ops.models.coat import cls_attention as coat_attention
from xattn_ops.models.crossvit import CrossViT
from xattn_ops.models.crossvit import cls_attention as crossvit_attention

POINT = (0.345, 0.56)  # row, column of the chosen pixel and patch as fractions: a portrait's face
KEY = "red: more than an even share of attention, blue: less"
KNOWN = ("cabvit_", "cat_", "coat_", "crossvit_")
CLS_KEY = "red: more than the map's mean, blue: less"
DIGEST_KEY = "red: more than an even share of tokens and digests, blue: less; one range a row"


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the demo; the exit status is 1 if an operator disagrees with its reference.

    Raises:
        ValueError: an image, model or checkpoint that cannot be used.
    """
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    picture = photo.load(args.image, args.size)
    model = load_model(args.model, args.weights)
    cls_maps: list[tuple[str, Tensor]] = []
    digest_maps: list[tuple[str, AttentionMaps]] = []
    if isinstance(model, CabViT | PlainCabViT):
        digest_maps = attention_on_digests(model, picture.tensor, args.block)
    else:
        cls_maps = attention_of_cls(model, picture.tensor, args.block, args.model)
    said = "official weights" if args.weights else "RANDOM weights"
    console.print(
        f"[bold]{args.model}[/] with {said} on {picture.name} "
        f"({picture.size} x {picture.size}), kernels: {_library.isa() or 'none, reference only'}"
    )
    if not args.weights:
        console.print(
            "[yellow]The weights are random: accuracy and speed are real, but the pictures show an "
            "untrained network. Give --weights FILE for a trained one."
        )
    with thread_count(args.threads) as threads:
        captured, output = measure.capture(model, picture.tensor)
        features = maps_of(model, picture.tensor, output)
        measured = _measure(captured, args.batch, args.seconds, console)
    console.print(_agreement(measured))
    console.print(_work(measured, args.batch, threads))
    about = f"{args.model}, {said}"
    if any(one.faster == "busy" for one in measured):
        console.print("[yellow]The machine is busy with something else: no ratio where it says so.")
    for path in draw(picture, captured, features, cls_maps, digest_maps, measured, args.out, about):
        console.print(f"wrote {path}")
    wrong = [one.captured for one in measured if not one.check.passed]
    for one in wrong:
        console.print(f"[red]{one.operator} at stage {one.stage} disagrees with its reference")
    return 1 if wrong else 0


def load_model(name: str, weights: Path | None) -> nn.Module:
    """The feature extractor of that name in eval mode, seeded where there are no weights.

    Of CrossViT the classifier, for without its head the last stage has no cross attention.

    Raises:
        ValueError: no such model or checkpoint.
    """
    known = [model for model in list_models() if model.startswith(KNOWN)]
    if name not in known:
        raise ValueError(f"no model {name!r} to show; there are {', '.join(known)}")
    torch.manual_seed(0)
    model: nn.Module = create_model(name, features_only=not name.startswith("crossvit_"))
    if weights is not None:
        if not weights.is_file():
            raise ValueError(f"no checkpoint at {weights}")
        try:
            state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{weights} is not a checkpoint that can be read: {error}") from error
        load_official(model, state)
    return model.eval()


@torch.no_grad()
def maps_of(model: nn.Module, image: Tensor, output: Any) -> list[Tensor]:
    """The feature maps behind a model's output, [1, C, H, W]: of CrossViT, one of each branch."""
    return model.maps(image) if isinstance(model, CrossViT) else list(output)


def attention_of_cls(
    model: nn.Module, image: Tensor, block: int | None, name: str
) -> list[tuple[str, Tensor]]:
    """What each map is called, and how much a CLS token takes of each place: [heads, H, W].

    Of CoaT a map for each stage, of CrossViT for each stage and branch, of others none.

    Raises:
        ValueError: no stage has such a block, or `block` is given for a model without a choice.
    """
    if isinstance(model, CoaT):
        return _attention_of_coat(model, image, block)
    if block is not None:
        choice = "one of each" if isinstance(model, CrossViT) else "neither of them"
        raise ValueError(f"--block chooses maps of CLS or of digests, and {name} has {choice}")
    if not isinstance(model, CrossViT):
        return []
    branches = ("small branch's CLS", "large branch's CLS")
    return [
        (f"stage {stage},\n{branch}", one[0])
        for stage in range(1, len(model.blocks) + 1)
        for branch, one in zip(branches, crossvit_attention(model, image, stage), strict=True)
    ]


def _attention_of_coat(model: CoaT, image: Tensor, block: int | None) -> list[tuple[str, Tensor]]:
    """A map for each stage.

    Args:
        block: which of a stage's blocks, from 0, or from -1 backwards; None: the last. Stages
            without it are left out.

    Raises:
        ValueError: no stage has such a block.
    """
    wanted = -1 if block is None else block
    depths = {stage: len(model.attentions(stage)) for stage in SCALES}
    maps = []
    for stage, depth in depths.items():
        if -depth <= wanted < depth:
            name = f"stage {stage}, block {wanted % depth}"
            maps.append((name, coat_attention(model, image, stage, wanted)[0]))
    if not maps:
        deepest = max(depths.values())
        raise ValueError(f"--block must be -{deepest} to {deepest - 1}, got {wanted}")
    return maps


def attention_on_digests(
    model: CabViT | PlainCabViT, image: Tensor, block: int | None
) -> list[tuple[str, AttentionMaps]]:
    """What each block is called, and its attention (CabViT, Fig. 6).

    Args:
        block: which of a stage's blocks, from 0, or from -1 backwards; None: every second one, as
            in the paper. Stages without it are left out.

    Raises:
        ValueError: no stage has such a block.
    """
    stages = (3, 4) if isinstance(model, CabViT) else (1,)
    depths = {stage: len(model.cab_blocks(stage)) for stage in stages}
    found = []
    for stage, depth in depths.items():
        wanted = range(1, depth, 2) if block is None else [block] * (-depth <= block < depth)
        for index in wanted:
            name = f"stage {stage}, block {index % depth}"
            found.append((name, attention_maps(model, image, stage, index)))
    if not found:
        deepest = max(depths.values())
        raise ValueError(f"--block must be -{deepest} to {deepest - 1}, got {block}")
    return found


def draw(
    picture: photo.Photo,
    captured: list[measure.Captured],
    features: list[Tensor],
    cls_maps: list[tuple[str, Tensor]],
    digest_maps: list[tuple[str, AttentionMaps]],
    measured: list[measure.Measured],
    out: Path,
    about: str,
) -> list[Path]:
    """Write every PNG; returns their paths."""
    paths = [out / "feature_maps.png"]
    rows = "branch" if any(one.operator == "clsattn" for one in captured) else "stage"
    title = f"Feature maps, {rows} by {rows} ({about})"
    pictures.feature_maps(picture, features, paths[-1], title, rows)
    ipsa = [one for one in captured if one.operator == "ipsa"]
    if ipsa:
        paths.append(out / "ipsa_attention.png")
        title = f"IPSA: what one pixel looks at inside its window ({about})\n{KEY}"
        pictures.inner_patch_attention_maps(picture, ipsa, POINT, paths[-1], title)
    cpsa = [one for one in captured if one.operator == "cpsa"]
    if cpsa:
        paths.append(out / "cpsa_attention.png")
        several = [one for one in cpsa if one.x.shape[1] > one.window[0]]  # one patch: no choice
        title = f"CPSA: which patches one patch looks at, channel by channel ({about})\n{KEY}"
        pictures.cross_patch_attention_maps(picture, several or cpsa, POINT, paths[-1], title)
    if cls_maps:
        paths.append(out / "cls_attention.png")
        title = f"What the CLS token takes of each place ({about})\n{CLS_KEY}"
        pictures.cls_attention_maps(picture, cls_maps, paths[-1], title)
    if digest_maps:
        paths.append(out / "digest_attention.png")
        title = f"What one token takes of the others and of earlier digests ({about})\n{DIGEST_KEY}"
        pictures.digest_attention_maps(picture, digest_maps, POINT, paths[-1], title)
    paths.append(out / "latency.png")
    threads, isa = measured[0].fused.threads, _library.isa() or "reference"
    title = f"Latency on the photo's activations, {threads} threads, float32, {isa}"
    pictures.latency_bars(measured, paths[-1], title)
    return paths


def _measure(
    captured: list[measure.Captured], batch: int, seconds: float, console: Console
) -> list[measure.Measured]:
    done = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(captured))
        for one in captured:
            progress.update(task, description=f"{one.operator} at stage {one.stage}")
            done.append(measure.measure(one, batch, seconds))
            progress.advance(task)
    return done


def _agreement(measured: list[measure.Measured]) -> Table:
    table = Table(title="Agreement: largest error against float64, on the photo's activations")
    for title in ("operator", "stage", "map"):
        table.add_column(title)
    for title in ("mean |out|", "eager float32", "xattn_ops"):
        table.add_column(title, justify="right")
    table.add_column("agrees")
    for one in measured:
        table.add_row(
            *_where(one),
            f"{one.magnitude:.3g}",
            f"{one.check.plain_error:.1e}",
            f"{one.check.error:.1e}",
            "[green]yes" if one.check.passed else "[red]NO",
        )
    return table


def _work(measured: list[measure.Measured], batch: int, threads: int) -> Table:
    table = Table(
        title=f"Work of one image, and time of batch {batch} with {threads} threads "
        "(medians, interleaved)"
    )
    for title in ("operator", "stage", "map"):
        table.add_column(title)
    for title in ("paper's MMACs", "counted", "eager ms", "xattn_ops ms", "faster", "spread"):
        table.add_column(title, justify="right")
    for one in measured:
        spread = max(one.fused.spread, one.eager.spread)
        table.add_row(
            *_where(one),
            f"{one.formula_macs / 1e6:.2f}",
            f"{one.counted_macs / 1e6:.2f}",
            f"{one.eager.median * 1e3:.2f}",
            f"{one.fused.median * 1e3:.2f}",
            one.faster,
            f"{spread:.0%}",
        )
    return table


def _where(one: measure.Measured) -> tuple[str, str, str]:
    return one.captured.operator.upper(), str(one.captured.stage), one.captured.shape
