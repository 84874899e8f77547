"""``python -m xattn_ops bench``: which cases, how long, and where the results go."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xattn_ops import explain, inner_patch_attention
from xattn_ops.benchmarks import cases, compare, memory, plots, report, sweep, throughput
from xattn_ops.benchmarks import device as devices
from xattn_ops.benchmarks.options import with_preset
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.runner import Row, Settings, run
from xattn_ops.benchmarks.timing import steady_heap, thread_count

Plan = list[tuple[str, int, str, str]]  # operator, stage, dtype, direction


def main(args: argparse.Namespace, console: Console) -> int:
    """Run the benchmark; the exit status is 1 if a result was wrong.

    Raises:
        ValueError: an operator, a model, a device or a number that does not exist.
    """
    args = with_preset(args)
    plan, growth, models = _plan(args), _sweeps(args), _throughput_models(args)
    old = None if args.compare is None else compare.load(args.compare)
    budget = args.budget or (0.2 if args.quick else 2.0)
    settings = Settings(budget=budget, compile=not args.quick, caches=tuple(args.cache))
    roofline = Roofline(device=args.device)
    steady = args.heap == "steady" and steady_heap()
    with thread_count(args.threads) as threads:
        console.print(_headline(args, threads))
        rows = _measure(plan, args, settings, roofline, console)
        peaks = [] if args.quick or args.no_memory else _memory(plan, args, threads, console)
        sweeps = _grow(growth, args, settings, console)
        rates = _rates(models, args, settings, console)
        described = _described(args, settings, steady)
        results = report.to_json(rows, peaks, roofline, threads, described, sweeps, rates)
    if rows:
        _show_rows(rows, peaks, roofline, args, console)
    if sweeps:
        console.print(report.sweep_table(sweeps))
    if rates:
        console.print(report.throughput_table(rates))
    refused = [f"{r.model} B={r.batch}: no ratio ({r.refused})" for r in rates if r.refused]
    for line in (*report.notes(rows), *report.sweep_notes(sweeps), *refused):
        console.print(f"[yellow]note:[/] {line}")
    if old is not None:
        console.print(report.compare_table(compare.changes(old, rows, settings)))
        for line in compare.differences(old, results):
            console.print(f"[yellow]note:[/] {line}")
    _write(args, results, rows, sweeps, console)
    return 0 if all(row.check.passed for row in rows) else 1


def _show_rows(
    rows: list[Row],
    peaks: list[memory.Peak],
    roofline: Roofline,
    args: argparse.Namespace,
    console: Console,
) -> None:
    if args.quick:
        console.print("Quick run: no compiled baselines, so the best may be better than shown.")
    console.print(report.table(rows))
    console.print(_roof(roofline))
    if peaks:
        console.print(report.memory_table(peaks))


def _write(
    args: argparse.Namespace,
    results: dict[str, Any],
    rows: list[Row],
    sweeps: list[sweep.Sweep],
    console: Console,
) -> None:
    """The files that were asked for."""
    title = _title(results["machine"], args.batch)
    written = []
    if args.json:
        report.write_json(args.json, results)
        written.append(args.json)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.markdown(rows))
        written.append(args.markdown)
    if args.plot:
        plots.save(plots.bars(rows, title), args.plot)
        written.append(args.plot)
    if args.plots:
        figures = {
            f"scaling_{over}": plots.scaling(sweeps, over, _title(results["machine"], None))
            for over in args.sweep
        }
        if rows:
            figures["latency"] = plots.latency(rows, title)
            figures["roofline"] = plots.roofline(rows, results["roofline"], title)
        for name, figure in figures.items():
            plots.save(figure, args.plots / f"{name}.png")
            written.append(args.plots / f"{name}.png")
    for path in written:
        console.print(f"wrote {path}")


def _plan(args: argparse.Namespace) -> Plan:
    """Every case to run: operators, unless something else is asked for and they are not; then the
    blocks, models and models of timm that are asked for."""
    for name in args.operators:
        if name not in cases.OPERATORS:
            raise ValueError(f"no operator {name!r}; there are {', '.join(cases.OPERATORS)}")
    for name in ("batch", "threads", "budget"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}")
    devices.check(args.device)
    instead = bool(args.sweep) or args.throughput is not None
    whole = args.blocks or args.models is not None or args.timm is not None
    if args.cases is False and not (instead or whole):
        raise ValueError("--no-cases leaves nothing to measure: add --models, say, or --sweep")
    names = list(dict.fromkeys(args.operators or cases.OPERATORS))
    operators_too = args.cases
    if operators_too is None:
        operators_too = not instead and (bool(args.operators) or not whole)
    staged = [case for name in names for case in cases.OPERATORS[name]] if operators_too else []
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


def _sweeps(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(operator, over) of every sweep."""
    for size in args.sizes or ():
        if size < 1 or ("side" in args.sweep and size % 56):
            raise ValueError(
                f"--sizes must be batches, or sides in multiples of 56 pixels, got {size}"
            )
    return sweep.plan(args.sweep, args.operators or list(cases.OPERATORS))


def _throughput_models(args: argparse.Namespace) -> list[str]:
    if args.throughput is None:
        return []
    throughput.check_models(args.throughput)
    return args.throughput or throughput.paper_models()


def _measure(
    plan: Plan,
    args: argparse.Namespace,
    settings: Settings,
    roofline: Roofline,
    console: Console,
) -> list[Row]:
    rows: list[Row] = []
    with _progress(console) as progress:
        task = progress.add_task("timing", total=len(plan))
        for operator, stage, dtype, direction in plan:
            progress.update(task, description=f"{operator} stage {stage} {dtype} {direction}")
            kind = getattr(torch, dtype)
            case = cases.build(operator, stage, args.batch, kind, direction, args.device)
            rows += run(case, settings, roofline)
            progress.advance(task)
    return rows


def _memory(
    plan: Plan, args: argparse.Namespace, threads: int, console: Console
) -> list[memory.Peak]:
    """Ours and eager, for each case of the plan that trains."""
    if why := memory.available(args.device):
        console.print(f"[yellow]note:[/] no peak memory: {why}")
        return []
    trained = [(o, s, d) for o, s, d, direction in plan if direction == cases.STEP]
    peaks = []
    with _progress(console) as progress:
        task = progress.add_task("peak memory", total=2 * len(trained))
        for operator, stage, dtype in trained:
            for variant in ("fused", "eager"):
                progress.update(task, description=f"memory of {operator} stage {stage} {variant}")
                where = (operator, stage, args.batch, dtype, variant, threads, args.device)
                peaks.append(memory.measure(*where))
                progress.advance(task)
    return peaks


def _grow(
    growth: list[tuple[str, str]], args: argparse.Namespace, settings: Settings, console: Console
) -> list[sweep.Sweep]:
    """Every sweep in every dtype and direction."""
    runs = [(*one, t, d) for one in growth for t in args.dtype for d in args.direction]
    found: list[sweep.Sweep] = []
    with _progress(console) as progress:
        task = progress.add_task("growth", total=len(runs))
        for operator, over, dtype, direction in runs:
            found += sweep.measure(
                operator,
                over,
                getattr(torch, dtype),
                direction,
                settings,
                args.device,
                args.sizes,
                lambda words: progress.update(task, description=words),
            )
            progress.advance(task)
    return found


def _rates(
    models: list[str], args: argparse.Namespace, settings: Settings, console: Console
) -> list[throughput.Rate]:
    """Every model in every dtype, without batching and at --batch."""
    batches = sorted({1, args.batch})
    runs = [(m, b, dtype) for m in models for dtype in args.dtype for b in batches]
    rates = []
    with _progress(console) as progress:
        task = progress.add_task("throughput", total=len(runs))
        for model, batch, dtype in runs:
            progress.update(task, description=f"{model} B={batch} {dtype}")
            rates.append(
                throughput.rate(model, batch, getattr(torch, dtype), settings, args.device)
            )
            progress.advance(task)
    return rates


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def _headline(args: argparse.Namespace, threads: int) -> str:
    x = torch.zeros(1, 7, 7, 3, dtype=getattr(torch, args.dtype[0]), device=args.device)
    backend = explain(inner_patch_attention, x, num_heads=1).backend
    where = devices.name(args.device) or report.cpu_name()
    words = f"{where}, {threads} threads, batch {args.batch}, backend {backend}"
    if backend == "reference":
        words += " [yellow](no native kernels: ours is the reference formulation itself)[/]"
    return words


def _described(args: argparse.Namespace, settings: Settings, steady: bool) -> dict[str, Any]:
    described = {**vars(settings), "batch": args.batch, "quick": args.quick, "steady_heap": steady}
    asked = {"dtype": args.dtype, "direction": args.direction, "preset": args.preset}
    return {**described, **asked, "device": args.device}


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


def _title(machine: dict[str, Any], batch: int | None) -> str:
    words = [machine["accelerator"] or machine["cpu"], f"{machine['threads']} threads"]
    words += [] if batch is None else [f"batch {batch}"]
    return ", ".join([*words, f"torch {machine['versions']['torch']}"])
