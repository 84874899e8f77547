"""How time grows with the image and the batch, and images a second of whole models."""

import json
from dataclasses import replace

import pytest
import torch
from support.benchmarks import QUICK, calm

from xattn_ops.benchmarks import cases, report, runner, sweep, throughput
from xattn_ops.benchmarks.cases import FORWARD, STEP
from xattn_ops.benchmarks.sweep import Point, Sweep

# ---- Sweeps --------------------------------------------------------------------------------------


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


# ---- Throughput ----------------------------------------------------------------------------------


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
