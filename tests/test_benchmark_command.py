"""Cold caches, devices, comparisons with earlier runs, and what the command runs beside what."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from support.benchmarks import QUICK, ROOF, calm, tiny

from xattn_ops import cli
from xattn_ops.benchmarks import (
    cases,
    command,
    compare,
    device,
    memory,
    options,
    plots,
    report,
    roofline,
    runner,
    timing,
)
from xattn_ops.benchmarks.cases import FORWARD, STEP
from xattn_ops.benchmarks.roofline import Roofline


def asked(*arguments):
    return options.with_preset(cli.parser().parse_args(["bench", *arguments]))


# ---- Cold caches ---------------------------------------------------------------------------------


def test_what_runs_before_a_sample_is_not_timed_and_a_sample_is_one_call():
    calls, clock = [], iter(range(100))
    timings = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        budget=0,
        min_rounds=2,
        sample_seconds=10,
        warmup=1,
        before=lambda: calls.append("evict") or next(clock),
        wait=lambda: calls.append("wait"),
    )
    assert calls == ["evict", "a", "wait", "evict", "b", "wait"] * 3
    assert timings["a"].calls_per_round == 1


def test_a_case_is_timed_warm_and_cold_after_one_check(monkeypatch):
    evictions, checks = [], []
    monkeypatch.setattr(runner, "evict", lambda where: lambda: evictions.append(where))
    right = runner.compare
    monkeypatch.setattr(runner, "compare", lambda *a: checks.append(0) or right(*a))
    settings = replace(QUICK, caches=("warm", "cold"))
    warm, cold = runner.run(tiny("cpsa"), settings, ROOF)
    assert (warm.cache, cold.cache) == ("warm", "cold")
    assert len(checks) == 1
    assert set(evictions) == {"cpu"}
    assert cold.ratios.keys() == warm.ratios.keys() == {"eager", "sdpa"}
    assert cold.ratios is not warm.ratios
    assert cold.label == warm.label + " cold"
    assert cold.key != warm.key


def test_eviction_walks_through_twice_the_cache(monkeypatch):
    device._evictor.cache_clear()
    monkeypatch.setattr(device, "cache_bytes", lambda where: 1000)
    before = device._evictor("cpu").clone()
    assert before.numel() == 2000
    device.evict("cpu")()
    assert torch.equal(device._evictor("cpu"), before + 1)
    device._evictor.cache_clear()


def test_a_cold_row_is_held_against_memory(monkeypatch):
    seen = []
    monkeypatch.setattr(roofline, "cache_bytes", lambda where: 1 << 20)
    roof = Roofline()
    monkeypatch.setattr(roof, "flops", lambda dtype: 1e9)
    monkeypatch.setattr(roof, "bandwidth", lambda nbytes: seen.append(nbytes) or 1.0)
    assert roof.least_seconds(1, 8, torch.float32) == 8
    assert roof.least_seconds(1, 8, torch.float32, cold=True) == 8
    assert seen == [8, 4 << 20]


# ---- Devices -------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "cpsa", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA device that torch sees" in capsys.readouterr().err


def test_cases_lie_where_they_are_built():
    """On meta, which stands for any other device: no operand stays behind."""
    for name in cases.OPERATORS:
        for direction in (FORWARD, STEP):
            case = cases.build(name, 0, 1, torch.float32, direction, "meta")
            tensors = [t for v in case.ours.values() for t in (*v.arguments, *v.leaves)]
            tensors += [t for v in case.plain.values() for t in v.leaves]
            assert {t.device.type for t in tensors} == {"meta"}
            assert case.device == "meta"


def test_operands_are_the_same_on_every_device():
    here = cases.build("cpsa", 3, 1, torch.float32, FORWARD)
    with torch.device("cpu"):
        there = cases.build("cpsa", 3, 1, torch.float32, FORWARD)
    assert torch.equal(here.ours["fused"].arguments[0], there.ours["fused"].arguments[0])


def test_cuda_s_peak_is_that_of_its_allocator(monkeypatch):
    cuda = Mock(**{"memory_allocated.return_value": 30, "max_memory_allocated.return_value": 100})
    monkeypatch.setattr(torch, "cuda", cuda)
    assert memory._on_cuda(lambda: (torch.ones(1),)) == ((torch.ones(1),), 70)
    cuda.reset_peak_memory_stats.assert_called_once()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_command_runs_on_cuda(tmp_path):
    path = tmp_path / "cuda.json"
    arguments = ["--quick", "--stages", "3", "--batch", "1", "--device", "cuda"]
    assert cli.main(["bench", "cpsa", *arguments, "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["machine"]["accelerator"]
    assert {row["device"] for row in data["rows"]} == {"cuda"}


# ---- Against an earlier run ----------------------------------------------------------------------


def measured(seconds, **changes):
    row = runner.run(tiny("cpsa"), QUICK, ROOF)[0]
    return replace(row, timing=calm(seconds, **changes))


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        pytest.param(calm(1.0), calm(0.5), "faster", id="faster"),
        pytest.param(calm(1.0), calm(1.5), "slower", id="slower"),
        pytest.param(calm(1.0), calm(0.97), "same", id="within-noise"),
        pytest.param(calm(1.0, iqr=0.2), calm(0.85), "same", id="within-the-spread"),
        pytest.param(
            calm(1.0, iqr=0.5),
            calm(0.5),
            "machine busy: spread of then is 50%, limit 25%",
            id="busy-then",
        ),
    ],
)
def test_changes_since_an_earlier_run(then, now, verdict):
    row = measured(1.0)
    old = {"rows": [replace(row, timing=then).to_dict()]}
    (change,) = compare.changes(old, [replace(row, timing=now)], runner.Settings())
    assert change.case == "cpsa 6x9x8 float32 fwd"
    assert change.factor == then.median / now.median
    assert change.verdict == verdict
    assert report.compare_table([change]).row_count == 1


def test_cases_of_one_run_alone_are_not_compared():
    row = measured(1.0)
    others = [replace(row, batch=3), replace(row, cache="cold"), replace(row, dtype="bfloat16")]
    old = {"rows": [one.to_dict() for one in others]}
    assert compare.changes(old, [row], runner.Settings()) == []


def test_a_file_from_before_rows_had_macs_is_read():
    row = measured(0.5)
    data = row.to_dict()
    for key in ("device", "cache", "macs", "bytes"):
        del data[key]
    data |= {"gflops": 2 * row.macs / 0.5 / 1e9, "gbps": 1.0}
    read = runner.Row.from_dict(json.loads(json.dumps(data)))
    assert (read.macs, read.device, read.cache, read.key) == (row.macs, "cpu", "warm", row.key)
    assert read.timing == row.timing
    assert read.check == row.check


def test_machines_that_differ_are_named():
    then = {"cpu": "A", "cores": 2, "threads": 2, "isa": "avx2", "versions": {"torch": "2.12"}}
    now = {**then, "cpu": "B", "versions": {"torch": "2.13"}, "accelerator": None}
    lines = compare.differences({"machine": then}, {"machine": now})
    assert lines == ["cpu was A, is B", "torch was 2.12, is 2.13"]


def test_the_command_compares_with_its_own_results(tmp_path, capsys):
    path = tmp_path / "old.json"
    run = ["bench", "cpsa", "--quick", "--stages", "3", "--batch", "1", "--direction", FORWARD]
    run += ["--budget", "0.05"]
    assert cli.main([*run, "--json", str(path)]) == 0
    assert cli.main([*run, "--compare", str(path), "--cache", "warm", "cold"]) == 0
    out = capsys.readouterr().out
    assert "Against the earlier run" in out
    assert "cpsa 7x7x768 cold" in out
    assert out.count("cpsa 7x7x768 float32 fwd") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no results at", id="missing"),
        pytest.param("{", "is not JSON", id="not-json"),
        pytest.param("[]", "holds no benchmark results", id="not-results"),
        pytest.param('{"rows": []}', "holds no benchmark results", id="other-object"),
    ],
)
def test_files_that_hold_no_results_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["bench", "cpsa", "--compare", str(path)]) == 2
    assert message in capsys.readouterr().err


# ---- The command ---------------------------------------------------------------------------------


def test_the_paper_s_preset_asks_for_everything_and_gives_way_to_what_is_given():
    args = asked("--preset", "paper", "--cache", "cold", "--batch", "2")
    assert args.cases
    assert args.blocks
    assert (args.models, args.throughput, args.sweep) == ([], [], ["side", "batch"])
    assert args.cache == ["cold"]
    assert args.batch == 2
    plan = command._plan(args)
    assert {name for name, *_ in plan} >= {"ipsa", "cpsa", "convrel", "cab", "cat_small"}
    assert asked("--preset", "quick").quick


@pytest.mark.parametrize(
    ("arguments", "planned", "swept"),
    [
        pytest.param(["cpsa"], True, [], id="cases"),
        pytest.param(
            ["cpsa", "--sweep", "side", "batch"],
            False,
            [("msa", "side"), ("cpsa", "side"), ("cpsa", "batch")],
            id="a-sweep-instead",
        ),
        pytest.param(["cpsa", "--sweep", "batch", "--cases"], True, [("cpsa", "batch")], id="both"),
        pytest.param(["--throughput"], False, [], id="throughput-instead"),
        pytest.param(["--throughput", "--models", "cat_tiny"], True, [], id="throughput-and-model"),
        pytest.param(
            ["cpsa", "--no-cases", "--sweep", "batch"],
            False,
            [("cpsa", "batch")],
            id="only-a-sweep",
        ),
    ],
)
def test_what_runs_beside_what(arguments, planned, swept):
    args = asked(*arguments)
    assert bool(command._plan(args)) == planned
    assert command._sweeps(args) == swept


def test_nothing_to_measure_is_refused(capsys):
    assert cli.main(["bench", "cpsa", "--no-cases"]) == 2
    assert "--no-cases leaves nothing to measure: add --models, say" in capsys.readouterr().err


def test_the_command_sweeps_and_measures_throughput(tmp_path, capsys):
    path, pictures = tmp_path / "growth.json", tmp_path / "plots"
    sizes = ["--sweep", "side", "--sizes", "56", "112", "168"]
    run = ["bench", "convpos", *sizes, "--throughput", "cat_tiny", "--batch", "1"]
    run += ["--direction", FORWARD, "--budget", "0.01", "--threads", "1", "--cases"]
    run += ["--quick", "--stages", "3"]
    assert cli.main([*run, "--json", str(path), "--plots", str(pictures)]) == 0
    out = capsys.readouterr().out
    assert "Growth of time" in out
    assert "Throughput of inference" in out
    data = json.loads(path.read_text())
    assert data["schema"] == report.SCHEMA
    assert data["settings"]["device"] == "cpu"
    assert data["machine"].keys() >= {"accelerator", "cache_bytes", "commit", "versions"}
    assert [one["operator"] for one in data["sweeps"]] == ["msa", "convpos", "convpos"]
    assert [one["model"] for one in data["throughput"]] == ["cat_tiny"]
    assert {p.stem for p in pictures.iterdir()} == {"scaling_side", "latency", "roofline"}
    for picture in pictures.iterdir():
        with Image.open(picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_plots_of_nothing_are_refused():
    for plot in (plots.bars, plots.latency):
        with pytest.raises(ValueError, match="nothing was timed"):
            plot([], "title")
    with pytest.raises(ValueError, match="nothing was timed"):
        plots.roofline([], {"copy_gbps_by_bytes": {}, "gflops": {}}, "title")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--throughput", "cat_huge"], "no model 'cat_huge'; there are", id="model"),
        pytest.param(
            ["--sweep", "side", "--sizes", "100"],
            "sides in multiples of 56 pixels, got 100",
            id="side",
        ),
        pytest.param(["--sweep", "batch", "--sizes", "0"], "got 0", id="batch"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
