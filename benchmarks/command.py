"""``python -m xattn_ops bench``: which cases, how long, and where the results go."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xattn_ops import explain, inner_patch_attention
from xattn_ops.benchmarks import cases, memory, report
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.runner import Row, Settings, run
from xattn_ops.benchmarks.timing import steady_heap, thread_count

Plan = list[tuple[str, int, str, str]]  # operator, stage, dtype, direction


def main(args: argparse.Namespace, console: Console) -> int:
    """Run the benchmark; the exit status is 1 if a result was wrong.

    Raises:
        ValueError: an operator, a model or a number that does not exist.
    """
    plan = _plan(args)
    budget = args.budget or (0.2 if args.quick else 2.0)
    settings = Settings(budget=budget, compile=not args.quick)
    roofline, steady = Roofline(), args.heap == "steady" and steady_heap()
    with thread_count(args.threads) as threads:
        console.print(_headline(args, threads))
        rows = _measure(plan, args.batch, settings, roofline, console)
        peaks = [] if args.quick or args.no_memory else _memory(plan, args.batch, threads, console)
        results = report.to_json(rows, peaks, roofline, threads, _described(args, settings, steady))
    if args.quick:
        console.print("Quick run: no compiled baselines, so the best may be better than shown.")
    console.print(report.table(rows))
    console.print(_roof(roofline))
    if peaks:
        console.print(report.memory_table(peaks))
    for line in report.notes(rows):
        console.print(f"[yellow]note:[/] {line}")
    if args.json:
        report.write_json(args.json, results)
        console.print(f"wrote {args.json}")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.markdown(rows))
        console.print(f"wrote {args.markdown}")
    if args.plot:
        report.plot(rows, args.plot, _title(results["machine"], args.batch))
        console.print(f"wrote {args.plot}")
    return 0 if all(row.check.passed for row in rows) else 1


def _plan(args: argparse.Namespace) -> Plan:
    """Every case to run, operators first, then blocks, then models, then timm's.

    Blocks, models and timm's alone where they are asked for and no operator is.
    """
    for name in args.operators:
        if name not in cases.OPERATORS:
            raise ValueError(f"no operator {name!r}; there are {', '.join(cases.OPERATORS)}")
    for name in ("batch", "threads", "budget"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}")
    whole = args.blocks or args.models is not None or args.timm is not None
    only_whole = whole and not args.operators
    names = list(dict.fromkeys(args.operators or cases.OPERATORS))
    staged = [] if only_whole else [case for name in names for case in cases.OPERATORS[name]]
    if args.blocks:
        staged += dict.fromkeys(cases.BLOCKS[name] for name in names if name in cases.BLOCKS)
    models = args.models
    if models == []:
        models = dict.fromkeys(model for name in names for model in cases.MODELS[name])
    for name in models or ():
        cases.check_model(name)
    timms = list(cases.TIMM) if args.timm == [] else args.timm or []
    for name in timms:
        cases.check_timm(name)
    return [
        (name, stage, dtype, direction)
        for name in (*staged, *(models or ()), *(f"timm/{name}" for name in timms))
        for dtype in args.dtype
        for direction in args.direction
        for stage in _stages(args.stages, name)
    ]


def _stages(wanted: list[int] | None, name: str) -> list[int]:
    """Which shapes of a case to run; a model has one."""
    if name not in cases.SHAPES:
        return [0]
    there = range(len(cases.SHAPES[name]))
    for stage in wanted or ():
        if stage not in there:
            raise ValueError(f"{name} has the stages 0 to {there[-1]}, got --stages {stage}")
    return list(there) if wanted is None else wanted


def _measure(
    plan: Plan, batch: int, settings: Settings, roofline: Roofline, console: Console
) -> list[Row]:
    rows: list[Row] = []
    with _progress(console) as progress:
        task = progress.add_task("timing", total=len(plan))
        for operator, stage, dtype, direction in plan:
            progress.update(task, description=f"{operator} stage {stage} {dtype} {direction}")
            case = cases.build(operator, stage, batch, getattr(torch, dtype), direction)
            rows += run(case, settings, roofline)
            progress.advance(task)
    return rows


def _memory(plan: Plan, batch: int, threads: int, console: Console) -> list[memory.Peak]:
    """Ours and eager, for each case of the plan that trains."""
    if why := memory.available():
        console.print(f"[yellow]note:[/] no peak memory: {why}")
        return []
    trained = [(o, s, d) for o, s, d, direction in plan if direction == cases.STEP]
    peaks = []
    with _progress(console) as progress:
        task = progress.add_task("peak memory", total=2 * len(trained))
        for operator, stage, dtype in trained:
            for variant in ("fused", "eager"):
                progress.update(task, description=f"memory of {operator} stage {stage} {variant}")
                peaks.append(memory.measure(operator, stage, batch, dtype, variant, threads))
                progress.advance(task)
    return peaks


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def _headline(args: argparse.Namespace, threads: int) -> str:
    x = torch.zeros(1, 7, 7, 3, dtype=getattr(torch, args.dtype[0]))
    backend = explain(inner_patch_attention, x, num_heads=1).backend
    words = f"{report.cpu_name()}, {threads} threads, batch {args.batch}, backend {backend}"
    if backend == "reference":
        words += " [yellow](no native kernels: ours is the reference formulation itself)[/]"
    return words


def _described(args: argparse.Namespace, settings: Settings, steady: bool) -> dict[str, Any]:
    described = {**vars(settings), "batch": args.batch, "quick": args.quick, "steady_heap": steady}
    return {**described, "dtype": args.dtype, "direction": args.direction}


def _roof(roofline: Roofline) -> str:
    """The measured limits behind the column `roof`."""
    measured = roofline.to_dict()
    peaks = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in measured["gflops"].items())
    copies = measured["copy_gbps_by_bytes"]
    speeds = ", ".join(f"{int(size) >> 10} KiB {value:.0f} GB/s" for size, value in copies.items())
    return (
        f"roof: the larger of arithmetic at the best linear's rate ({peaks}) and traffic at the "
        f"rate of a copy of that size ({speeds}), over the time. GFLOP/s counts the paper's "
        "algorithm (of clsattn the absorbed form), a training step as three forwards."
    )


def _title(machine: dict[str, Any], batch: int) -> str:
    torch_version = machine["versions"]["torch"]
    return f"{machine['cpu']}, {machine['threads']} threads, batch {batch}, torch {torch_version}"
