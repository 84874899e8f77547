"""The benchmark runner: it times what is right, on a calm machine, and says so otherwise."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.benchmarks import QUICK, ROOF, calm, tiny

from xattn_ops import cli, inner_patch_attention
from xattn_ops.benchmarks import cases, command, memory, report, roofline, runner, timing
from xattn_ops.benchmarks.cases import FORWARD, STEP
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.benchmarks.timing import Timing

OPERATORS = list(cases.BUILDERS)


def timed_as(monkeypatch, **timings):
    """Let the runner measure the given timings; the variants must be those."""

    def interleaved(variants, **_):
        assert set(variants) == set(timings)
        return timings

    monkeypatch.setattr(runner, "interleaved", interleaved)


# ---------------------------------------------------------------------------------------- timing


def test_every_variant_runs_in_every_round_in_order():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = timing.interleaved(
        variants, budget=0, min_rounds=4, max_rounds=9, sample_seconds=0, warmup=2
    )
    assert calls == ["a", "a", "b", "b", "c", "c"] + ["a", "b", "c"] * 4
    assert list(timings) == ["a", "b", "c"]
    assert all(t.rounds == 4 and t.calls_per_round == 1 for t in timings.values())


def test_rounds_go_on_until_the_budget_is_spent_and_not_beyond_the_most():
    timings = timing.interleaved({"a": int}, budget=1e9, max_rounds=7, sample_seconds=0)
    assert timings["a"].rounds == 7


def test_a_short_call_is_repeated_within_a_sample():
    calls = []
    timings = timing.interleaved(
        {"a": lambda: calls.append(0)}, budget=0, min_rounds=2, sample_seconds=10, warmup=1
    )
    assert timings["a"].calls_per_round == 1000
    assert len(calls) == 1 + 2 * 1000


def test_spread_is_the_interquartile_range_over_the_median():
    measured = Timing.from_samples([1.0, 2.0, 3.0, 4.0, 5.0], 1)
    assert (measured.median, measured.fastest, measured.iqr) == (3.0, 1.0, 2.0)
    assert measured.to_dict()["spread"] == pytest.approx(2 / 3)


def test_the_number_of_threads_is_set_recorded_and_given_back():
    before = torch.get_num_threads()
    with timing.thread_count(1) as threads:
        assert threads == torch.get_num_threads() == 1
        assert timing.interleaved({"a": int}, budget=0, sample_seconds=0)["a"].threads == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"variants": {}}, "variants must name", id="nothing"),
        pytest.param({"variants": {"a": int}, "min_rounds": 1}, "min_rounds=1", id="one-round"),
        pytest.param({"variants": {"a": int}, "max_rounds": 3}, "max_rounds=3", id="max-below-min"),
    ],
)
def test_timing_refuses_what_gives_no_median(arguments, message):
    with pytest.raises(ValueError, match=message):
        timing.interleaved(**arguments)


# ---------------------------------------------------------------------------------------- runner


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_case_passes_its_check_and_is_measured(operator, dtype, direction):
    (row,) = runner.run(tiny(operator, direction, dtype), QUICK, ROOF)
    assert row.check.passed, row.check
    assert row.refused == ""
    assert row.timing.median > 0
    assert {"eager"} <= set(row.baselines) == set(row.ratios)
    usual = [ratio for name, ratio in row.ratios.items() if name not in row.apart]
    assert row.best_ratio == min(usual)
    assert row.gflops > 0 < row.gbps
    assert row.roofline_share > 0
    assert set(row.skipped.values()) == {"left out"}


@pytest.mark.parametrize(("operator", "other"), [("ipsa", "sdpa"), ("convrel", "nhwc")])
def test_compiled_baselines_run_where_they_are_asked_for(operator, other):
    case = tiny(operator)
    (row,) = runner.run(case, replace(QUICK, compile=True), ROOF)
    assert {"eager", other} <= set(row.baselines)
    assert set(row.baselines) | set(row.skipped) == set(case.plain)


@pytest.mark.parametrize(("operator", "output"), [*((name, 0) for name in OPERATORS), ("merge", 1)])
def test_the_gate_trips_on_a_wrong_output(operator, output, monkeypatch):
    case = tiny(operator)
    right = case.ours["fused"]
    outs = list(right.forward())
    outs[output] = outs[output] * 1.01
    wrong = replace(right, function=lambda *_: tuple(outs))
    monkeypatch.setattr(runner, "interleaved", lambda *_, **__: pytest.fail("was timed"))
    (row,) = runner.run(replace(case, ours={"fused": wrong}), QUICK, ROOF)
    assert not row.check.passed
    assert row.timing is None
    assert not row.ratios
    name = "output" if len(outs) == 1 else f"output {output}"
    assert row.refused.startswith(f"wrong result: {name} is off by")


def test_the_gate_trips_on_a_wrong_gradient(monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, table):
            return table.view_as(table)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    def wrong(qkv, table):
        return inner_patch_attention(qkv, Scaled.apply(table), num_heads=2, window=(3, 3))

    case = tiny("ipsa", STEP)
    ours = {"fused": replace(case.ours["fused"], function=wrong)}
    (row,) = runner.run(replace(case, ours=ours), QUICK, ROOF)
    assert row.refused.startswith("wrong result: gradient 1 is off by")


def test_the_gate_trips_on_nan():
    case = tiny("cpsa")
    ours = {"fused": replace(case.ours["fused"], function=lambda x, *_: x * float("nan"))}
    (row,) = runner.run(replace(case, ours=ours), QUICK, ROOF)
    assert not row.check.passed


def test_our_own_failure_is_not_skipped():
    case = tiny("cpsa")

    def fails(*_):
        raise RuntimeError("no kernel")

    ours = {"fused": replace(case.ours["fused"], function=fails)}
    with pytest.raises(RuntimeError, match="no kernel"):
        runner.run(replace(case, ours=ours), QUICK, ROOF)


def test_a_baseline_that_fails_is_named_and_left_out():
    case = tiny("cpsa")

    def fails(*_):
        raise NotImplementedError("not on this device\nmore")

    plain = {**case.plain, "sdpa": replace(case.plain["sdpa"], function=fails)}
    (row,) = runner.run(replace(case, plain=plain), QUICK, ROOF)
    assert row.skipped["sdpa"] == "NotImplementedError: not on this device"
    assert "sdpa" not in row.ratios
    assert any("sdpa did not run" in line for line in report.notes([row]))


def test_ratios_are_of_medians_and_the_best_is_the_fastest_baseline(monkeypatch):
    timed_as(monkeypatch, fused=calm(1.0), eager=calm(6.0), sdpa=calm(4.0))
    (row,) = runner.run(tiny("cpsa"), runner.Settings(compile=False), ROOF)
    assert row.ratios == {"eager": 6.0, "sdpa": 4.0}
    assert (row.best, row.best_ratio) == ("sdpa", 4.0)


@pytest.mark.parametrize(
    ("changes", "reason", "kept"),
    [
        pytest.param(
            {"fused": {"iqr": 0.3}}, "spread of fused is 30%, limit 25%", set(), id="ours-spreads"
        ),
        pytest.param({"sdpa": {"iqr": 2.0}}, "spread of sdpa is 50%", {"eager"}, id="best-spreads"),
        pytest.param(
            {"eager": {"iqr": 3.0, "fastest": 3.0}},
            "spread of eager is 50%",
            {"sdpa"},
            id="a-rival-might-be-faster",
        ),
        pytest.param(
            {"fused": {"waited": 0.5}},
            "threads waited for a core 50% of the time, limit 10%",
            set(),
            id="steadily-busy",
        ),
    ],
)
def test_a_busy_machine_gives_no_ratio(changes, reason, kept, monkeypatch):
    timings = {"fused": calm(1.0), "eager": calm(6.0), "sdpa": calm(4.0)}
    timings |= {name: replace(timings[name], **fields) for name, fields in changes.items()}
    timed_as(monkeypatch, **timings)
    (row,) = runner.run(tiny("cpsa"), runner.Settings(compile=False), ROOF)
    assert row.best_ratio is None
    assert set(row.ratios) == kept
    assert row.refused.startswith("machine busy")
    assert reason in row.refused
    assert reason in " ".join(report.notes([row]))


def test_a_restless_baseline_that_cannot_be_the_best_does_not_matter(monkeypatch):
    slow = calm(6.0, iqr=3.0, fastest=5.0)
    timed_as(monkeypatch, fused=calm(1.0), eager=slow, sdpa=calm(4.0))
    (row,) = runner.run(tiny("cpsa"), runner.Settings(compile=False), ROOF)
    assert row.best_ratio == 4.0
    assert set(row.ratios) == {"sdpa"}


def test_a_baseline_apart_has_a_ratio_but_is_not_the_best(monkeypatch):
    case = replace(tiny("cpsa"), apart=("sdpa",))
    timed_as(monkeypatch, fused=calm(1.0), eager=calm(6.0), sdpa=calm(4.0))
    (row,) = runner.run(case, runner.Settings(compile=False), ROOF)
    assert (row.best, row.ratios) == ("eager", {"eager": 6.0, "sdpa": 4.0})
    timed_as(monkeypatch, fused=calm(1.0), eager=calm(6.0), sdpa=calm(4.0, iqr=3.0))
    (restless,) = runner.run(case, runner.Settings(compile=False), ROOF)
    assert (restless.best_ratio, restless.ratios) == (6.0, {"eager": 6.0})
    assert report.markdown([row, restless]).splitlines()[2:] == [
        "| cpsa float32 | 6x9x8 | 6.0 / 6.0 |",
        "| cpsa float32, over sdpa | 6x9x8 | 4.0 / busy |",
    ]


# ---------------------------------------------------------------------------- roofline and memory


def test_the_roofline_is_bound_by_arithmetic_or_by_traffic():
    roof = Roofline()
    roof._flops[torch.float32] = 100.0
    roof._bandwidth[1 << 20] = 10.0
    assert roof.least_seconds(1000, 1 << 20, torch.float32) == (1 << 20) / 10
    assert roof.least_seconds(10**9, 1 << 20, torch.float32) == 10**7


def test_the_roofline_is_unknown_while_the_machine_is_busy_and_tried_again(monkeypatch):
    waited = iter([0.0, 1e9, 0.0, 1e9, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(roofline, "queued_seconds", lambda: next(waited))
    roof = Roofline(seconds=0.001)
    assert roof.least_seconds(1, 1, torch.float32) is None
    assert roof.to_dict() == {"gflops": {}, "copy_gbps_by_bytes": {}}
    assert roof.least_seconds(1, 1, torch.float32) > 0


def test_the_roofline_measures_once_for_each_power_of_two(monkeypatch):
    monkeypatch.setattr(roofline, "queued_seconds", lambda: 0.0)
    roof = Roofline(seconds=0.001)
    first = roof.bandwidth((1 << 17) - 5)
    assert roof.bandwidth((1 << 16) + 1) == first > 0
    assert list(roof.to_dict()["copy_gbps_by_bytes"]) == [str(1 << 17)]
    assert roof.flops(torch.float32) > 0


@pytest.mark.skipif(bool(memory.available()), reason=memory.available())
def test_peak_memory_counts_at_least_the_results():
    peak = memory.measure("cpsa", 3, 2, "float32", "eager", threads=1)
    shapes = [(2, 7, 7, 768)] * 2 + [(147, 49), (147,), (49, 49), (49,)]
    assert peak.result_bytes == 4 * sum(torch.Size(shape).numel() for shape in shapes)
    assert peak.result_bytes <= peak.peak_bytes < 1 << 30
    assert peak.bytes_per_token == peak.peak_bytes / (2 * 49)


@pytest.mark.skipif(bool(memory.available()), reason=memory.available())
def test_peak_memory_of_a_detectors_map_is_a_few_maps_and_no_matrix():
    peak = memory.measure("convrel", 6, 8, "float32", "fused", threads=1)
    assert (peak.batch, peak.tokens) == (1, 1 + 128 * 128)
    one_map = 4 * 64 * peak.tokens
    assert 4 * one_map <= peak.result_bytes <= peak.peak_bytes < 32 * one_map
    assert peak.dense_bytes == 8 * 4 * peak.tokens**2


def test_the_memory_table_gives_bytes_a_token_where_there_are_tokens(capsys):
    ours = memory.Peak("convrel", "128x128 8x8 B=1", 1, "float32", "fused", 2000, 1000, 0, 10)
    peaks = [ours, replace(ours, variant="eager", peak_bytes=5004)]
    peaks.append(replace(ours, operator="cab", shape="7x7x768", tokens=0))
    Console(width=150).print(report.memory_table(peaks))
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: line[-2:] for line in lines if "f32" in line}
    assert cells == {"convrel": ["200", "500"], "cab": ["-", "-"]}


@pytest.mark.skipif(bool(memory.available()), reason=memory.available())
def test_a_failing_memory_run_says_why():
    with pytest.raises(RuntimeError, match=r"memory run of cpsa \(fussed\) failed: KeyError"):
        memory.measure("cpsa", 3, 1, "float32", "fussed")


# --------------------------------------------------------------------------------- the command


def test_the_command_writes_json_and_a_plot(tmp_path, capsys):
    results, picture = tmp_path / "new" / "results.json", tmp_path / "bars.png"
    options = ["--quick", "--stages", "3", "--batch", "1", "--threads", "1", "--budget", "0.05"]
    status = cli.main(
        ["bench", "ipsa", "cpsa", *options, "--json", str(results), "--plot", str(picture)]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "Quick run" in out
    assert "ipsa_module 7x7x768" in out
    data = json.loads(results.read_text())
    assert data["schema"] == report.SCHEMA
    assert data["machine"]["cpu"]
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["threads"] == 1
    assert data["machine"]["versions"].keys() == {"python", "torch", "numpy", "xattn_ops"}
    assert "commit" in data["machine"]
    assert data["roofline"].keys() == {"gflops", "copy_gbps_by_bytes"}
    cells = {(row["operator"], row["direction"]) for row in data["rows"]}
    assert cells == {(o, d) for o in ("ipsa", "ipsa_module", "cpsa") for d in (FORWARD, STEP)}
    for row in data["rows"]:
        assert row["check"]["passed"]
        assert row["timing"]["median"] > 0
        assert row["timing"].keys() >= {"spread", "rounds", "threads", "waited"}
        assert row["baselines"].keys() == {"eager", "sdpa"}
        assert (row["best_ratio"] is None) == bool(row["refused"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(
            ["convrel", "--stages", "0", "7"],
            [("convrel", 0), ("convrel", 7), ("convrel_module", 0), ("convrel_module", 7)],
            id="stages",
        ),
        pytest.param(["convpos"], [("convpos", i) for i in range(8)], id="all-stages"),
        pytest.param(
            ["cpsa", "--stages", "3", "--blocks", "--models"],
            [("cpsa", 3), ("cab", 3), ("cat_small", 0)],
            id="what-goes-with-cat",
        ),
        pytest.param(
            ["convpos", "--stages", "3", "--blocks", "--models"],
            [("convpos", 3), ("coat_block", 3), ("coat_lite_small", 0), ("coat_mini", 0)],
            id="what-goes-with-coat",
        ),
        pytest.param(
            ["clsattn", "--blocks", "--models"],
            [("clsattn", 0), ("clsattn", 1), ("crossvit_15", 0)],
            id="what-goes-with-crossvit",
        ),
        pytest.param(
            ["digest", "--stages", "1", "--blocks", "--models"],
            [("digest", 1), ("cabvit_block", 1), ("cabvit_h_l2", 0)],
            id="what-goes-with-cabvit",
        ),
        pytest.param(
            ["--models", "--blocks", "--stages", "3"],
            [("cab", 3), ("coat_block", 3), ("cabvit_block", 3)]
            + [
                (name, 0)
                for name in (
                    "cat_small",
                    "coat_lite_small",
                    "coat_mini",
                    "cabvit_h_l2",
                    "crossvit_15",
                )
            ],
            id="blocks-and-models-alone",
        ),
        pytest.param(["--models", "coat_tiny"], [("coat_tiny", 0)], id="a-model"),
        pytest.param(["--no-cases", "--models", "cat_tiny"], [("cat_tiny", 0)], id="only-a-model"),
        pytest.param(
            ["cpsa", "--no-cases", "--blocks", "--stages", "2"], [("cab", 2)], id="only-a-block"
        ),
    ],
)
def test_the_command_plans_what_is_asked_for(arguments, expected):
    asked = cli.parser().parse_args(["bench", *arguments, "--direction", FORWARD])
    assert command._plan(asked) == [(*case, "float32", FORWARD) for case in expected]


def test_a_plan_goes_by_operator_dtype_direction_and_stage():
    arguments = ["bench", "cpsa", "convpos", "--stages", "1", "2", "--dtype", "float32", "bfloat16"]
    plan = command._plan(cli.parser().parse_args(arguments))
    names, dtypes = ("cpsa", "convpos"), ("float32", "bfloat16")
    directions, stages = (FORWARD, STEP), (1, 2)
    assert plan == [(n, s, t, d) for n in names for t in dtypes for d in directions for s in stages]


def test_the_markdown_has_a_line_for_each_operator_and_says_busy(monkeypatch):
    rows = []
    for ours in (calm(1.0), calm(2.0), calm(1.0, iqr=0.5)):
        timed_as(monkeypatch, fused=ours, eager=calm(6.0), sdpa=calm(4.0))
        rows += runner.run(tiny("cpsa"), runner.Settings(compile=False), ROOF)
    timed_as(monkeypatch, fused=calm(1.0), eager=calm(3.0), sdpa=calm(4.0))
    rows += runner.run(tiny("cpsa", STEP), runner.Settings(compile=False), ROOF)
    assert report.markdown(rows).splitlines() == [
        "| | shapes | fwd | fwdbwd |",
        "|---|---|---|---|",
        "| cpsa float32 | 6x9x8 | 4.0 / 2.0 / machine busy | 3.0 |",
    ]


def test_a_wrong_kernel_fails_the_command(monkeypatch, capsys):
    right = cases.cpsa.cross_patch_attention
    monkeypatch.setattr(cases.cpsa, "cross_patch_attention", lambda *a, **k: right(*a, **k) + 1)
    options = ["--quick", "--stages", "3", "--batch", "1", "--direction", "fwd", "--budget", "0.05"]
    assert cli.main(["bench", "cpsa", *options]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "cpsa 7x7x768" in line and "│" in line]
    assert line.replace("│", " ").split()[-1] == "wrong"
    assert "no ratio (wrong result: output is off by" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["ipsb"], "no operator 'ipsb'; there are ipsa, cpsa", id="operator"),
        pytest.param(
            ["cpsa", "--stages", "4"], "cpsa has the stages 0 to 3, got --stages 4", id="stage"
        ),
        pytest.param(["convpos", "--stages", "-1"], "got --stages -1", id="stage-below"),
        pytest.param(["--models", "cat_huge"], "no model 'cat_huge'; there are", id="model"),
        pytest.param(["--batch", "0"], "--batch must be above 0, got 0", id="batch"),
        pytest.param(["--threads", "-1"], "--threads must be above 0, got -1", id="threads"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
