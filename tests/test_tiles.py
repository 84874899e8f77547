"""The table of launches' shapes: order, columns, architectures, and that launches ask it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from xattn_ops import _tiles, _tuning
from xattn_ops._tiles import ARCHITECTURES, TABLE, Problem, Row, Shape, nearest

pytest.importorskip("triton", reason="Triton is not installed")
from xattn_ops import _triton
from xattn_ops.kernel_report import CALLS
from xattn_ops.kernel_report import triton as report

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = Problem("ipsa", 32, 49, torch.bfloat16)
operators = pytest.mark.parametrize("op", TABLE)


def test_the_first_row_that_holds_wins(monkeypatch):
    rows = (Row(1, kernel="a b"), Row(2, kernel="b"), Row(8, 2, edge=32))
    monkeypatch.setitem(TABLE, "ipsa", rows)
    shapes = [_tiles.shape(BF16, kernel, "sm_90") for kernel in ("a", "b", "c")]
    assert shapes == [Shape(1, 1, 0), Shape(1, 1, 0), Shape(8, 2, 32)]


@pytest.mark.parametrize(
    ("row", "held", "not_held"),
    [
        (Row(4, width=32), BF16, BF16._replace(width=33)),
        (Row(4, tokens=49), BF16, BF16._replace(tokens=50)),
        (Row(4, dtype="short"), BF16, BF16._replace(dtype=torch.float32)),
        (Row(4, dtype="short"), BF16._replace(dtype=torch.float16), None),
        (Row(4, dtype="float32"), BF16._replace(dtype=torch.float32), BF16),
        (Row(4, form="shifted padded"), BF16._replace(form="padded"), BF16),
        (Row(4, on="sm_80 sm_90"), BF16, None),
        (Row(4, kernel="backward forward"), BF16, None),
    ],
)
def test_a_row_holds_what_its_columns_let_through(row, held, not_held):
    assert row.holds("forward", held, "sm_90")
    assert not_held is None or not row.holds("forward", not_held, "sm_90")


def test_a_row_holds_its_kernels_and_architectures_alone():
    assert not Row(4, kernel="backward_rows").holds("backward", BF16, "sm_90")
    assert not Row(4, on="sm_80 sm_100").holds("forward", BF16, "sm_90")


@operators
def test_the_last_row_holds_every_call(op):
    *_, last = TABLE[op]
    assert last == Row(last.warps, last.stages, last.edge)


@operators
def test_shapes_are_launches_that_triton_takes(op):
    for row in TABLE[op]:
        assert row.warps in _tuning.WARPS
        assert row.stages in _tuning.STAGES
        assert row.edge in (0, 16, 32, 64)


@operators
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_75", "sm_89", "sm_130", "gfx1201"])
def test_every_call_has_a_row(op, architecture):
    for dtype, width, tokens in itertools.product(DTYPES, (1, 64, 4096), (1, 64, 10**6)):
        problem = Problem(op, width, tokens, dtype)
        assert _tiles.shape(problem, "no such kernel", architecture).warps > 0


@pytest.mark.parametrize(
    ("architecture", "known"),
    [
        *((architecture, architecture) for architecture in ARCHITECTURES),
        ("sm_70", "sm_80"),  # older than all
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_200", "sm_120"),  # newer than all
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_unknown_architectures_go_by_the_nearest(architecture, known):
    assert nearest(architecture) == known


@pytest.fixture
def cards(monkeypatch):
    """A process with cards of two kinds."""
    kinds = [SimpleNamespace(major=9, minor=0), SimpleNamespace(major=12, minor=0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", kinds.__getitem__)
    _tiles.of_card.cache_clear()
    yield
    _tiles.of_card.cache_clear()


def test_each_card_has_its_own_architecture(cards):
    assert [_tiles.of_card(index) for index in (0, 1, 0)] == ["sm_90", "sm_120", "sm_90"]


def test_cards_of_amd_are_named_without_their_features(monkeypatch):
    card = SimpleNamespace(major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    _tiles.of_card.cache_clear()
    assert _tiles.of_card(0) == "gfx942"
    _tiles.of_card.cache_clear()


def test_the_table_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from xattn_ops._tiles import shape"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- launches


def recorded(op: str, architecture: str, dtype: torch.dtype = torch.bfloat16):
    with _triton.recording(architecture) as launches:
        for call in CALLS[op].values():
            call.run(dtype)
    return launches


def test_every_operator_has_rows():
    assert set(TABLE) == set(CALLS)


@operators
@pytest.mark.parametrize(("architecture", "said"), [("sm_100", (16, 4)), ("gfx942", (2, 3))])
def test_launches_take_what_the_table_says(op, architecture, said, monkeypatch):
    rows = (Row(16, 4, edge=32, on="sm_100"), Row(2, 3, edge=32))
    monkeypatch.setitem(TABLE, op, rows)
    launches = recorded(op, architecture)
    assert {(launch.warps, launch.stages) for launch in launches} == {said}


@operators
def test_every_row_serves_a_call(op, monkeypatch):
    """One that serves none of the calls in the report has no evidence, or stands too low."""
    asked, shape = set(), _tiles.shape
    monkeypatch.setattr(_tiles, "shape", lambda *of: asked.add(of) or shape(*of))
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES[:2]):
        recorded(op, architecture, dtype)
    served = {
        next(row for row in TABLE[op] if row.holds(kernel, problem, architecture))
        for problem, kernel, architecture in asked
    }
    assert served == set(TABLE[op])


def test_a_launch_goes_by_the_card_of_its_tensors(cards):
    asked = [
        _triton.shape(BF16._replace(form="padded"), "backward", torch.device(*device))
        for device in (("cuda", 0), ("cuda", 1), ("cpu",))
    ]
    on = [_tiles.shape(BF16._replace(form="padded"), "backward", a) for a in ("sm_90", "sm_120")]
    assert on[0] != on[1]
    assert asked == [*on, _tiles.shape(BF16._replace(form="padded"), "backward", _tiles.DEFAULT)]


# ---------------------------------------------------------------------------------------- sweep


@pytest.fixture
def compiler(monkeypatch):
    """Says what each launch would take, without compiling."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(report, "_compile", lambda launch, _: (1024 // launch.warps, 0, 0, 0, {}))


def test_a_sweep_sets_the_neighbours_beside_what_was_chosen(compiler):
    plain = list(report.figures(["convpos"], ["sm_90"], ["bfloat16"]))
    swept = list(report.figures(["convpos"], ["sm_90"], ["bfloat16"], sweep=True))
    assert [row for row in swept if row.chosen] == plain
    for row in plain:
        same = [r for r in swept if (r.call, r.kernel) == (row.call, row.kernel)]
        shapes = {(r.warps, r.stages) for r in same}
        assert shapes == set(_tuning.candidates((row.warps, row.stages)))


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "resident"),
    [
        ("sm_80", 4, 128, 0, 16),  # 4 x 128 of the 2048 registers of a lane: 4 blocks
        ("sm_80", 4, 121, 0, 16),  # they are given out by eights
        ("sm_80", 4, 32, 0, 64),
        ("sm_120", 4, 32, 0, 48),
        ("sm_80", 1, 16, 0, 32),  # blocks are limited too
        ("sm_90", 4, 32, 75 * 1024, 12),  # each with 1 KiB of CUDA's
        ("gfx942", 8, 128, 0, 16),
    ],
)
def test_warps_of_a_multiprocessor(architecture, warps, registers, shared, resident):
    names = ("ipsa", "", True, "forward", architecture, "bfloat16", True)
    row = report.Figures(*names, warps, 2, registers, 0, shared, 1, {})
    assert row.resident == resident


@pytest.mark.parametrize(
    ("architecture", "allowed"),
    [("sm_80", 99), ("sm_86", 99), ("sm_90", 227), ("sm_100", 227), ("sm_120", 99), ("gfx942", 64)],
)
def test_shared_memory_fits_every_card_that_is_launched_alike(architecture, allowed):
    """sm_86 and sm_89 take the launches of sm_80, and have less of it."""
    names = ("ipsa", "", False, "forward", architecture, "float32", True)
    for shared, breaks in [(allowed << 10, False), ((allowed << 10) + 1, True)]:
        row = report.Figures(*names, 4, 2, 128, 0, shared, 1, {})
        assert row.broken == [f"{shared} bytes of shared memory"] * breaks
