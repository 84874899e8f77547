"""Sweeps, throughput, cold caches, comparisons and plots of the benchmark."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from support.benchmarks import tiny

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
    sweep,
    throughput,
    timing,
)
from xattn_ops.benchmarks.cases import FORWARD, STEP
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.sweep import Point, Sweep
from xattn_ops.benchmarks.timing import Timing

QUICK = runner.Settings(budget=0.01, min_rounds=3, compile=False, max_spread=1e9, max_waited=1e9)
ROOF = Mock(spec=Roofline, **{"least_seconds.return_value": 1e-9})


def calm(seconds, **changes):
    return replace(Timing(seconds, seconds, 0.01 * seconds, 9, 1, 1), **changes)


def asked(*arguments):
    return options.with_preset(cli.parser().parse_args(["bench", *arguments]))


# ---- Cold caches --------------------------------------------------------------------------------


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


# ---- Devices ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys):
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


# ---- Sweeps -------------------------------------------------------------------------------------


def grown(exponent, *, sizes=(112, 168, 224, 336, 448), busy=(), overhead=0.0, paper=1.0):
    points = [
        Point(
            size,
            size * size // 16,
            round(1000 * (size * size) ** paper),
            size * size * 384,
            overhead + 1e-9 * (size * size) ** exponent,
            "machine busy" if size in busy else "",
        )
        for size in sizes
    ]
    return Sweep("ipsa", "fused", "side", "float32", FORWARD, "cpu", points)


def test_the_slope_is_the_exponent():
    assert sweep.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_the_fit_is_over_the_larger_half():
    one = grown(1.0, overhead=0.0)
    one.points[0] = replace(one.points[0], seconds=1.0)
    found = sweep.fit(one, None)
    assert found.sizes == (224, 336, 448)
    assert found.exponent == pytest.approx(1)
    assert found.paper == pytest.approx(1, abs=1e-6)
    assert found.agrees
    assert found.reason == ""


@pytest.mark.parametrize(
    ("exponent", "overhead", "words"),
    [
        pytest.param(
            1.3, 0.0, ["(last cache 32 MiB): the rate falls", "operands 18.4"], id="cache"
        ),
        pytest.param(
            1.0, 1e-3, ["the rate still rises", "1013 us at side 112"], id="launch-overhead"
        ),
    ],
)
def test_an_exponent_that_is_not_the_paper_s_comes_with_numbers(exponent, overhead, words):
    found = sweep.fit(grown(exponent, overhead=overhead), 32 << 20)
    assert not found.agrees
    assert found.reason.startswith("side 224 to 448: ")
    for part in words:
        assert part in found.reason


def test_the_reason_for_cpsa_names_the_form_that_is_executed():
    """Half of eq. 3's linear part, and all of its quadratic one: its exponent is larger."""
    one = replace(grown(2.2, sizes=(336, 448, 672, 896)), operator="cpsa")
    found = sweep.fit(one, None)
    assert found.reason.startswith(
        "the absorbed form, which the kernel executes, grows with 1.91; side"
    )
    eager = sweep.fit(replace(one, variant="eager"), None)
    assert eager.reason.startswith("side 448 to 896: ")


def test_busy_points_are_left_out_and_too_few_give_no_exponent():
    sizes = (56, 112, 168, 224, 336, 448, 672)
    one = grown(1.0, sizes=sizes, busy=(336,))
    assert sweep.fit(one, None).sizes == (224, 448, 672)
    two = grown(1.0, busy=(336,))
    two.fit = sweep.fit(two, None)
    assert two.fit is None
    (note,) = report.sweep_notes([two])
    assert note.endswith("machine busy at 336, left out of the fit")


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("operator", [sweep.MSA, *cases.SWEPT])
def test_an_operator_is_swept_over_the_side(operator, direction):
    found = sweep.measure(operator, "side", torch.float32, direction, QUICK, sizes=(56, 112, 168))
    names = ["sdpa"] if operator == sweep.MSA else ["fused", "eager"]
    assert [one.variant for one in found] == names
    for one in found:
        assert [point.size for point in one.points] == [56, 112, 168]
        macs = [point.macs for point in one.points]
        assert macs == sorted(macs)
        assert macs[0] > 0
        assert one.complexity
        assert Sweep.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_the_plain_attention_of_a_sweep_is_quadratic_and_ipsa_linear():
    exponents = {}
    for name in (sweep.MSA, "ipsa"):
        one = sweep.measure(name, "side", torch.float32, FORWARD, QUICK, sizes=(112, 168, 224))[0]
        exponents[name] = one.fit.paper
    assert exponents == {sweep.MSA: pytest.approx(2), "ipsa": pytest.approx(1)}


def test_a_sweep_over_the_batch_has_its_images():
    ours, eager = sweep.measure("cpsa", "batch", torch.float32, FORWARD, QUICK, sizes=(1, 2, 3))
    assert [point.x for point in ours.points] == [1, 2, 3]
    assert ours.complexity == "linear"
    assert ours.fit.paper == pytest.approx(1)
    assert [point.macs for point in eager.points] == [point.macs for point in ours.points]


def test_a_wrong_result_ends_a_sweep(monkeypatch):
    right = cases.cpsa.cross_patch_attention
    monkeypatch.setattr(cases.cpsa, "cross_patch_attention", lambda *a, **k: right(*a, **k) + 1)
    with pytest.raises(RuntimeError, match="cpsa 14x14x96 B=1: wrong result: output is off by"):
        sweep.measure("cpsa", "side", torch.float32, FORWARD, QUICK, sizes=(56,))


# ---- Throughput ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat_tiny", "crossvit_tiny"])
def test_images_a_second_of_a_model(name):
    one = throughput.rate(name, 2, torch.float32, QUICK)
    assert one.images == 2 / one.ours.median
    assert one.plain_images == 2 / one.plain.median
    assert one.ratio == pytest.approx(one.images / one.plain_images)
    assert one.printed == (1668 if name == "crossvit_tiny" else None)
    assert one.macs > 1e9
    assert throughput.Rate.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_no_ratio_of_models_on_a_busy_machine(monkeypatch):
    busy = {"ours": calm(1.0), "plain": calm(2.0, waited=0.5)}
    monkeypatch.setattr(throughput, "interleaved", lambda *_, **__: busy)
    one = throughput.rate("cat_tiny", 1, torch.float32, runner.Settings())
    assert one.ratio is None
    assert one.refused.startswith("machine busy: our threads waited")


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        throughput.baselines, "plain_copy", right := throughput.baselines.plain_copy
    )
    calls = []

    def wrong(model):
        twin = right(model)
        if not calls:
            torch.nn.init.zeros_(twin.head.weight)
        calls.append(0)
        return twin

    monkeypatch.setattr(throughput.baselines, "plain_copy", wrong)
    with pytest.raises(RuntimeError, match="cat_tiny: output is off by"):
        throughput.rate("cat_tiny", 1, torch.float32, QUICK)


def test_the_models_of_the_papers():
    names = throughput.paper_models()
    assert names[0] == "cat_tiny"
    assert {"coat_mini", "crossvit_18_dagger_384"} <= set(names)
    assert len(names) == len(set(names))


def test_the_throughput_table_has_both_batches_and_the_paper_s(capsys):
    one = throughput.Rate(
        "crossvit_15", 224, 1, "float32", "cpu", 27_528_464, 5_790_600_000, calm(0.1), calm(0.2),
        printed=640,
    )  # fmt: skip
    eight = replace(one, batch=8, ours=calm(0.4), plain=calm(0.5), refused="machine busy: x")
    table = report.throughput_table([one, eight])
    assert [column.header for column in table.columns][4:] == [
        "B=1", "plain", "x", "B=8", "plain", "x", "paper, V100, B=64",
    ]  # fmt: skip
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == [
        "crossvit_15", "224", "27.5", "5.8", "10.0", "5.0", "2.00", "20.0", "16.0",
        "[yellow]busy", "640",
    ]  # fmt: skip


# ---- Against an earlier run ---------------------------------------------------------------------


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


# ---- The command --------------------------------------------------------------------------------


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
        pytest.param(["--no-cases"], False, [], id="nothing"),
    ],
)
def test_what_runs_beside_what(arguments, planned, swept):
    args = asked(*arguments)
    assert bool(command._plan(args)) == planned
    assert command._sweeps(args) == swept


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
