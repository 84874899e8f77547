"""The CUDA kernels on the host, from their own source: see tests/emulation.

On a card the same matrix runs in tests/test_gpu.py. Cases that would take the emulator too long
stand in the operators' descriptions (`unemulated`); others take the same ways through the kernels.
"""

from __future__ import annotations

import pytest
import torch
from support.cases import Case, assert_equal
from support.emulator import (
    SCHEDULES,
    SHARED_LIMITS,
    emulated,
    emulator,
    flavours,
    module_name,
)
from support.layouts import changed, check_as_dense, layouts
from support.leaf_calls import Calls
from support.operators import OPERATORS, SMALL, of
from support.oracle import check_against_float64, check_nan_stays_in_its_image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from xattn_ops import explain

pytestmark = emulated

KERNELS = list(OPERATORS)
TOO_LONG = {f"{op}-{id}" for op, operator in OPERATORS.items() for id in operator.unemulated}
FLOATS = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]
kernels = pytest.mark.parametrize("op", KERNELS)
floats = pytest.mark.parametrize("dtype", FLOATS)
short_floats = pytest.mark.parametrize("dtype", FLOATS[1:])


@of("cases", "dropout", among=KERNELS, without=TOO_LONG)
def test_against_float64(op: str, case: Case) -> None:
    with emulator("plain"):
        check_against_float64(case, torch.float32, "cuda", seed=5)


@short_floats
@of("cases", "dropout", among=KERNELS, without=TOO_LONG, few=True)
def test_short_formats_against_float64(op: str, case: Case, dtype: torch.dtype) -> None:
    with emulator("plain", "backward"):
        check_against_float64(case, dtype, "cuda", seed=5)


@of("extreme", among=[op for op in KERNELS if op != "digest"], without=TOO_LONG)
def test_extreme_logits(op: str, case: Case) -> None:
    with emulator("plain"):
        check_against_float64(case, torch.float32, "cuda")


@short_floats
@of("extreme", among=[op for op in KERNELS if op == "digest"], without=TOO_LONG)
def test_extreme_logits_of_digest(op: str, case: Case, dtype: torch.dtype) -> None:
    """In the short formats, see test_triton.py."""
    with emulator("plain"):
        check_against_float64(case, dtype, "cuda")


@floats
@of("cases", "dropout", among=KERNELS, without=TOO_LONG, few=True)
def test_no_fault(op: str, case: Case, dtype: torch.dtype) -> None:
    """Bounds, uninitialised memory, races and alignment of every access, and the results too."""
    with emulator("checked", "random_late"):
        check_against_float64(case, dtype, "cuda", seed=5)


@pytest.mark.parametrize("dtype", FLOATS[:2])
@of("cases", "dropout", among=KERNELS, without=TOO_LONG, few=True)
def test_every_schedule_gives_the_same_bits(op: str, case: Case, dtype: torch.dtype) -> None:
    tensors, grad_outs = case.tensors(dtype), case.grad_outs(dtype)
    results = []
    for schedule in ["forward", *SCHEDULES]:
        torch.manual_seed(5)
        with emulator("plain", schedule):
            results.append(case.run(tensors, grad_outs, backend="cuda"))
    for result in results[1:]:
        assert_equal(result, results[0])


@floats
@pytest.mark.parametrize("card", ["sm_80", "sm_86"])
@of("cases", among=KERNELS, without=TOO_LONG, few=True)
def test_less_shared_memory(op: str, case: Case, dtype: torch.dtype, card: str) -> None:
    """No card has too little of it."""
    with emulator("plain", shared_limit=SHARED_LIMITS[card]):
        check_against_float64(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", FLOATS[:2])
@layouts
@of("strided", among=KERNELS)
def test_layouts(op: str, case: Case, layout: str, dtype: torch.dtype) -> None:
    with emulator("checked"):
        check_as_dense(case, *changed(case, dtype, layout), "cuda")


@kernels
def test_nan_stays_in_its_image(op: str) -> None:
    with emulator("plain"):
        check_nan_stays_in_its_image(SMALL[op], torch.float32, "cuda")


@flavours
@kernels
def test_leaf_ops_give_what_their_fakes_say(op: str, flavour: str) -> None:
    """Shapes, dtypes and strides of every return, what is kept for the backward included."""
    case = SMALL[op]
    tensors, grad_outs = case.tensors(torch.bfloat16), case.grad_outs(torch.bfloat16)
    with emulator(flavour), Calls(module_name(flavour)) as calls:
        case.run(tensors, grad_outs, backend="cuda")
    names = [func._schema.name.split("::")[1] for func, _, _ in calls.seen]
    assert names == [f"{op}_fwd", f"{op}_bwd"]
    for func, args, result in calls.seen:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = func(*args)
        for got, said in zip(tree_leaves(result), tree_leaves(fake), strict=True):
            assert (got.dtype, got.shape, got.stride()) == (said.dtype, said.shape, said.stride())


@kernels
def test_float64_is_refused(op: str) -> None:
    case = SMALL[op]
    tensors = case.tensors(torch.float64, requires_grad=False)
    message = "its CUDA kernels take float32, bfloat16 or float16, got float64"
    with emulator("plain"):
        with pytest.raises(ValueError, match=f"backend 'cuda' cannot serve .*{message}"):
            case.outputs(tensors, backend="cuda")
        assert explain(case.function, **tensors, **case.options).refused["cuda"] == message


@kernels
def test_leaf_op_refuses_float64(op: str) -> None:
    """The second line of checks, behind a direct call of torch.ops."""
    tensors = SMALL[op].tensors(torch.float32, requires_grad=False)
    with emulator("plain"), Calls(module_name("plain")) as calls:
        SMALL[op].outputs(tensors, backend="cuda")
    ((func, args, _),) = calls.seen
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16|float64"):
        func(*wide)
