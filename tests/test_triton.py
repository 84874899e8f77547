"""The Triton kernels under Triton's interpreter, and what the compilers make of them.

tests/conftest.py turns the interpreter on where there is no GPU, so that they take CPU tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.cases import Case, assert_equal, interpreted
from support.operators import OPERATORS, SMALL, of
from support.oracle import (
    check_against_float64,
    check_draws_against_float64,
    check_nan_stays_in_its_image,
)

from xattn_ops import _backend, _tiles, explain
from xattn_ops._tiles import ARCHITECTURES
from xattn_ops.kernel_report import CALLS

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from xattn_ops import _triton
from xattn_ops._triton import recording

# operators that have Triton kernels
KERNELS = ("ipsa", "cpsa", "digest", "merge", "convrel", "convpos", "clsattn")
kernels = pytest.mark.parametrize("op", KERNELS)
LEFT_OUT = {  # too slow for the interpreter; other cases take the same ways through the kernels
    *(f"convrel-{id}" for id in ("coat_lite_stage2", "coat_lite_stage4", "coat_tiny", "coat_mini")),
    "convpos-coat_lite_stage2",
    *(f"digest-{id}" for id in ("three_chunks", "two_chunks", "dropout_two_chunks")),
    *("digest-cabvit_stage3", "digest-two_chunks-50", "digest-two_chunks--50"),
    *(f"merge-{id}" for id in ("cabvit_stage3", "cabvit_stage4", "cabvit_h_l2_stage3")),
    *(f"merge-{id}" for id in ("cabvit_plain", "many_tokens", "tall_grid")),
    # Extreme logits of the other sign, which the CPU's tests have too.
    *("ipsa--50", "cpsa-heads_1--1", "cpsa-heads_2--1", "clsattn--3", "digest-one_chunk--50"),
}
SHORT = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="f16")]


@interpreted
@of("cases", "dropout", among=KERNELS, without=LEFT_OUT)
def test_against_float64(op: str, case: Case) -> None:
    check_against_float64(case, torch.float32, "triton", seed=5)


@interpreted
@of("extreme", among=[op for op in KERNELS if op != "digest"], without=LEFT_OUT)
def test_extreme_logits(op: str, case: Case) -> None:
    check_draws_against_float64(case, torch.float32, "triton")


@interpreted
@pytest.mark.parametrize("dtype", SHORT)
@of("extreme", among=["digest"], without=LEFT_OUT)
def test_extreme_logits_of_digest(op: str, case: Case, dtype: torch.dtype) -> None:
    """In the short formats: in float32 a logit of hundreds is exact or not by the order of a sum,
    and where the reference happens to be exact no other order could follow it."""
    check_against_float64(case, dtype, "triton")


@interpreted
@of("cases", "dropout", among=KERNELS, without=LEFT_OUT, few=True)
def test_bfloat16_against_float64(op: str, case: Case) -> None:
    check_against_float64(case, torch.bfloat16, "triton", seed=5)


@interpreted
@kernels
def test_float16_against_float64(op: str) -> None:
    """One case: the kernels treat both short formats alike."""
    check_against_float64(SMALL[op], torch.float16, "triton", seed=5)


@interpreted
@pytest.mark.parametrize(
    ("op", "id"),
    [
        ("cpsa", "rectangular_5x2"),  # 12 tokens: copied into matrices of 32 rows
        ("cpsa", "tokens_20_padded"),
        ("digest", "wide_5x25"),  # bands of the table's gradient of 32 tokens
        ("digest", "prefix_2"),
    ],
)
def test_tiles_of_another_architecture(op: str, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_recorded", "sm_80")
    (case,) = next(given.values for given in OPERATORS[op].cases if given.id == id)
    check_against_float64(case, torch.bfloat16, "triton")


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the next so many launches fail as on a card of too little shared memory."""
    monkeypatch.setattr(_tiles, "_halved", {})
    run = InterpretedFunction.run

    def failing(times: int) -> None:
        left = [times]

        def refuse(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                return run(*args, **kwargs)
            left[0] -= 1
            raise OutOfResources(300_000, 101_376, "shared memory")

        monkeypatch.setattr(InterpretedFunction, "run", refuse)

    return failing


@interpreted
@pytest.mark.parametrize("times", [1, _tiles.HALVINGS])
@kernels
def test_smaller_tiles_where_the_card_has_too_little_memory(
    op: str, times: int, too_large: Callable[[int], None]
) -> None:
    too_large(times)
    check_against_float64(SMALL[op], torch.float32, "triton")
    assert sum(_tiles._halved.values()) == times


@interpreted
@kernels
def test_a_card_that_has_too_little_memory_for_any_tile(
    op: str, too_large: Callable[[int], None]
) -> None:
    case = SMALL[op]
    too_large(_tiles.HALVINGS + 1)
    said = (
        r"the Triton kernel \w+ does not fit this card at \d+ channels in torch.float32 \(out of "
    )
    with pytest.raises(RuntimeError, match=said + r".*\); backend='reference' takes them"):
        case.outputs(case.tensors(torch.float32, requires_grad=False), backend="triton")


@interpreted
@kernels
def test_twice_bitwise_equal(op: str) -> None:
    case = SMALL[op]
    tensors, grads = case.tensors(torch.float32), case.grad_outs(torch.float32)
    assert_equal(*(case.run(tensors, grads, backend="triton") for _ in range(2)))


@interpreted
@kernels
def test_nan_stays_in_its_image(op: str) -> None:
    check_nan_stays_in_its_image(SMALL[op], torch.float32, "triton")


@interpreted
@kernels
def test_float64_is_refused(op: str) -> None:
    case = SMALL[op]
    tensors = case.tensors(torch.float64, requires_grad=False)
    message = "its Triton kernels take float32, bfloat16 or float16, got float64"
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve .*{message}"):
        case.outputs(tensors, backend="triton")
    assert explain(case.function, **tensors, **case.options).refused["triton"] == message


@kernels
def test_launches_give_what_kernels_take(op: str) -> None:
    """Exactly that: a launch on a card refuses other arguments, the interpreter ignores them."""
    with recording("sm_90") as launches:
        for call in CALLS[op].values():
            call.run(torch.bfloat16)
    for launch in launches:
        assert set(launch.arguments) == set(launch.kernel.arg_names), launch.kernel


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    why = _backend._triton_missing.__wrapped__("xattn_ops.no_such_room")
    assert "its Triton kernels could not be loaded" in why
    assert "install triton" in why


# --------------------------------------------------------------------- compiled ahead of time


LEAST_SHARED = ("sm_80", "sm_120", "gfx942")  # the first serves sm_86 too, see cards.py


def on(row: dict[str, object], architecture: str) -> bool:
    return row["architecture"] == architecture


def compiled(op: str, *options: str) -> list[dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xattn_ops", "kernels", op, "--backend", "triton", "--json"]
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout, result.stderr
    rows = json.loads(result.stdout)
    assert [row for row in rows if row["broken"]] == []
    assert result.returncode == 0
    return rows


@pytest.mark.parametrize(("op", "architecture"), [("digest", "sm_80"), ("cpsa", "gfx942")])
def test_float32_fits_the_card(op: str, architecture: str) -> None:
    """Where it once asked for more shared memory than there is; the other tests read bfloat16."""
    assert compiled(op, "--arch", architecture, "--dtype", "float32")


@kernels
def test_bounds_of_the_binaries(op: str) -> None:
    """Every architecture compiles, and no kernel breaks the bounds that the table states. What is
    at no paper's shape is compiled for those with least shared memory."""
    rows = compiled(op, "--arch", *LEAST_SHARED)
    rows += compiled(op, "--paper", "--arch", *(set(ARCHITECTURES) - set(LEAST_SHARED)))
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    paper = [row for row in rows if row["paper"]]
    assert {row["dtype"] for row in paper} == {"bfloat16"}
    assert all(row["matrix"] for row in paper if row["products"])
    spilled = {(row["kernel"], row["call"]) for row in paper if row["spilled"] and on(row, "sm_80")}
    assert spilled == ({("backward", "56x56 x 96")} if op == "cpsa" else set())
    assert all(row["spilled"] == 0 for row in paper if on(row, "sm_90"))
