"""The benchmark of timm's models before and after patch."""

import sys
from unittest.mock import Mock

import pytest
import torch
from support.timm import small_swin, timm

from xattn_ops import cli
from xattn_ops.benchmarks import cases, command, runner
from xattn_ops.benchmarks.cases import FORWARD, STEP, patched
from xattn_ops.benchmarks.roofline import Roofline
from xattn_ops.integrations.timm import unpatch

NAME = "swin_tiny_patch4_window7_224"
QUICK = runner.Settings(budget=0.01, min_rounds=3, compile=False, max_spread=1e9, max_waited=1e9)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--timm"], [f"timm/{name}" for name in cases.TIMM], id="the-readme-s"),
        pytest.param(["--timm", NAME], [f"timm/{NAME}"], id="one"),
        pytest.param(
            ["--models", "cat_tiny", "--timm", NAME], ["cat_tiny", f"timm/{NAME}"], id="and-ours"
        ),
    ],
)
def test_the_command_plans_timms_models_by_name(arguments, expected):
    asked = cli.parser().parse_args(["bench", *arguments, "--direction", FORWARD])
    assert command._plan(asked) == [(name, 0, "float32", FORWARD) for name in expected]


def test_the_models_of_the_readme_are_timms():
    assert all(timm.is_model(name) for name in cases.TIMM)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
def test_a_model_is_timed_before_and_after_patch(direction, monkeypatch):
    def create_model(name, drop_path_rate):
        assert (name, drop_path_rate) == (NAME, 0.0)  # the same numbers both times
        model = small_swin()
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    case = cases.build(f"timm/{NAME}", 0, 2, torch.float32, direction)
    assert (case.operator, case.shape, case.batch) == (f"timm/{NAME}", "32x32", 2)
    roof = Mock(spec=Roofline, **{"least_seconds.return_value": 1e-9})
    (row,) = runner.run(case, QUICK, roof)
    assert row.check.passed
    assert row.ratios.keys() == {"eager"}
    after, before = case.ours["fused"].function, case.plain["eager"].function
    assert after.training == before.training == (direction == STEP)
    assert unpatch(before) == []
    assert len(unpatch(after)) == 4


def test_a_wrong_patch_is_not_timed(monkeypatch):
    def wrong(model):
        model.head.bias.data += 1

    monkeypatch.setattr(patched, "patch", wrong)
    monkeypatch.setattr(runner, "interleaved", lambda *_, **__: pytest.fail("was timed"))
    case = cases.build("timm/coat_lite_tiny", 0, 1, torch.float32, FORWARD)
    assert case.shape == "224x224"
    (row,) = runner.run(case, QUICK, Mock(spec=Roofline))
    assert row.refused.startswith("wrong result: output is off by")


def test_an_unknown_model_is_named(capsys):
    assert cli.main(["bench", "--timm", "swin_of_mine"]) == 2
    assert "timm has no model 'swin_of_mine'; see timm.list_models()" in capsys.readouterr().err


def test_without_timm_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["bench", "--timm"]) == 2
    assert "--timm needs timm, which cannot be imported: " in capsys.readouterr().err
