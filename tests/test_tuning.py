"""Opt-in tuning of Triton launches, with a card that is only said to be there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xattn_ops import _tuning

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.errors import OutOfResources

CARD = torch.device("cuda", 0)


def kernel() -> SimpleNamespace:
    def forward() -> None:
        """Stands for a jit function, of which only its name is read."""

    return SimpleNamespace(fn=forward)


class Stopwatch:
    """Says how long each shape takes, and which ones ran."""

    def __init__(self, times: dict[_tuning.Shape, float]) -> None:
        self.times, self.ran = times, []

    def run(self, shape: _tuning.Shape) -> None:
        self.ran.append(shape)
        if shape not in self.times:
            raise OutOfResources(300_000, 232_448, "shared memory")

    def milliseconds(self, call: Callable[[], None]) -> float:
        call()
        return self.times[self.ran[-1]]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A card of a name, nobody capturing, and a cache of its own."""
    properties = SimpleNamespace(name="Card 1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XATTN_CACHE_DIR", str(tmp_path / "caches"))
    _tuning._known.cache_clear()
    return tmp_path / "caches" / "triton.json"


def choose(
    watch: Stopwatch, monkeypatch: pytest.MonkeyPatch, chosen: _tuning.Shape = (4, 2), **more: int
) -> _tuning.Shape:
    monkeypatch.setattr(_tuning, "_milliseconds", watch.milliseconds)
    arguments = {"x": torch.empty(2, dtype=torch.bfloat16), "H": 7, "stride": 3, "BLOCK": 64}
    return _tuning.best(kernel(), 100, arguments | more, chosen, watch.run, CARD)


def test_the_fastest_is_taken_and_remembered(card, monkeypatch):
    watch = Stopwatch({(4, 2): 2.0, (8, 2): 1.0, (2, 1): 3.0})
    assert choose(watch, monkeypatch) == (8, 2)
    assert set(watch.ran) == set(_tuning.candidates((4, 2)))  # those that failed were tried too
    assert list(json.loads(card.read_text()).values()) == [[8, 2]]

    _tuning._known.cache_clear()  # another process
    later = Stopwatch({})
    assert choose(later, monkeypatch) == (8, 2)
    assert later.ran == []


def test_each_kind_of_launch_is_tuned_alone(card, monkeypatch):
    assert choose(Stopwatch({(4, 2): 1.0}), monkeypatch) == (4, 2)
    assert choose(Stopwatch({(8, 3): 1.0}), monkeypatch, BLOCK=128) == (8, 3)
    same = Stopwatch({})
    assert choose(same, monkeypatch, stride=5) == (4, 2)  # not known when the kernel is compiled
    assert len(json.loads(card.read_text())) == 2


def test_nothing_runs_where_everything_fails(card, monkeypatch):
    assert choose(Stopwatch({}), monkeypatch) == (4, 2)


def test_while_a_graph_is_captured_nothing_is_timed(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watch = Stopwatch({(8, 2): 1.0})
    assert choose(watch, monkeypatch) == (4, 2)
    assert watch.ran == []
    assert not card.exists()


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"a": 3}'])
def test_a_broken_file_holds_nothing(card, monkeypatch, text):
    card.parent.mkdir()
    card.write_text(text)
    assert choose(Stopwatch({(8, 2): 1.0}), monkeypatch) == (8, 2)


def test_a_folder_that_cannot_be_written_costs_only_the_memory(card, monkeypatch):
    card.parent.write_text("a file stands where the folder should be")
    assert choose(Stopwatch({(8, 2): 1.0}), monkeypatch) == (8, 2)
    assert choose(Stopwatch({}), monkeypatch) == (8, 2)


@pytest.mark.parametrize("chosen", [(1, 1), (4, 2), (16, 4)])
def test_candidates_are_launches_that_triton_takes(chosen):
    shapes = _tuning.candidates(chosen)
    assert shapes[0] == chosen
    assert len(set(shapes)) == len(shapes) > 2
    assert all(w in _tuning.WARPS and s in _tuning.STAGES for w, s in shapes)


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_it_is_opt_in(monkeypatch, value, wanted):
    if value is None:
        monkeypatch.delenv("XATTN_TUNE", raising=False)
    else:
        monkeypatch.setenv("XATTN_TUNE", value)
    assert _tuning.wanted() == wanted


def test_the_cache_stands_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("XATTN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuning.path() == tmp_path / "xattn_ops" / "triton.json"
