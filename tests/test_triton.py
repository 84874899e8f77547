"""The Triton kernels under Triton's interpreter, and what the compilers make of them.

tests/conftest.py turns the interpreter on where there is no GPU, so that they take CPU tensors.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from support.cases import Case, assert_equal, interpreted
from support.operators import OPERATORS, SMALL
from support.oracle import check_against_float64

from xattn_ops import _backend, explain

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = ("ipsa", "cpsa")  # operators that have Triton kernels
kernels = pytest.mark.parametrize("op", KERNELS)
FLOATS = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]


def of(*fields: str, few: bool = False) -> pytest.MarkDecorator:
    """Each case in these fields of the descriptions; few: those that run under every ISA."""
    return pytest.mark.parametrize(
        ("op", "case"),
        [
            pytest.param(op, *given.values, id=f"{op}-{given.id}")
            for op in KERNELS
            for field in fields
            for given in getattr(OPERATORS[op], field)
            if not few or given.id in OPERATORS[op].isa
        ],
    )


@interpreted
@of("cases", "dropout", "extreme")
def test_against_float64(op: str, case: Case) -> None:
    check_against_float64(case, torch.float32, "triton", seed=5)


@interpreted
@pytest.mark.parametrize("dtype", FLOATS[1:])
@of("cases", "dropout", few=True)
def test_short_formats_against_float64(op: str, case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, "triton", seed=5)


@interpreted
@kernels
def test_twice_bitwise_equal(op: str) -> None:
    case = SMALL[op]
    tensors, grads = case.tensors(torch.float32), case.grad_outs(torch.float32)
    assert_equal(*(case.run(tensors, grads, backend="triton") for _ in range(2)))


@interpreted
@kernels
def test_nan_stays_in_its_image(op: str) -> None:
    case = SMALL[op]
    tensors = case.tensors(torch.float32, requires_grad=False)
    clean = case.outputs(tensors, backend="triton")
    next(iter(tensors.values()))[1] = math.nan
    for out, before in zip(case.outputs(tensors, backend="triton"), clean, strict=True):
        assert torch.equal(out[0], before[0])
        assert out[1].isnan().any()


@interpreted
@kernels
def test_float64_is_refused(op: str) -> None:
    case = SMALL[op]
    tensors = case.tensors(torch.float64, requires_grad=False)
    message = "its Triton kernels take float32, bfloat16 or float16, got float64"
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve .*{message}"):
        case.outputs(tensors, backend="triton")
    assert explain(case.function, **tensors, **case.options).refused["triton"] == message


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    why = _backend._triton_missing.__wrapped__("xattn_ops.no_such_room")
    assert "its Triton kernels could not be loaded" in why
    assert "install triton" in why


# --------------------------------------------------------------------- compiled ahead of time


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, object]]:
    """What `python -m xattn_ops kernels` reads from the binaries, for every kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xattn_ops", "kernels", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, object]] = json.loads(result.stdout)
    return rows


def test_every_architecture_compiles(compiled: list[dict[str, object]]) -> None:
    seen = {(row["operator"], row["architecture"]) for row in compiled}
    wanted = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    assert seen == {(op, architecture) for op in KERNELS for architecture in wanted}


def test_bounds_of_the_binaries(compiled: list[dict[str, object]]) -> None:
    """No kernel breaks the bounds that the table states."""
    assert [row for row in compiled if row["broken"]] == []
    paper = [row for row in compiled if row["paper"] and row["products"]]
    assert {row["dtype"] for row in paper} == {"bfloat16"}
    assert all(row["matrix"] for row in paper)
    assert all(row["spilled"] == 0 for row in paper if row["architecture"] == "sm_90")
