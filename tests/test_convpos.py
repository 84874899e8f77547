"""conv_position_encoding: values, gradients, layouts, and its module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.convrel import LAYOUTS, POSITION_CASES, convpos
from support.convrel import SMALL_POSITION as SMALL
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import ConvPositionEncoding, conv_position_encoding
from xattn_ops.convrel import conv_position_encoding_reference

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@backends
@dtypes
@pytest.mark.parametrize("case", POSITION_CASES)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend)


# ------------------------------------------------------------------------- the reference itself


def encoding_by_loops(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The definition, token by token and channel by channel; shares nothing with the reference."""
    x, weight = tensors["x"], tensors["weight"]
    (H, W), prefix = case.options["grid"], case.options["num_prefix_tokens"]
    k = weight.shape[-1]
    out = x.clone()
    for n in range(prefix, x.shape[1]):
        y, column = divmod(n - prefix, W)
        if "bias" in tensors:
            out[:, n] += tensors["bias"]
        for i, j in ((i, j) for i in range(k) for j in range(k)):
            top, left = y + i - k // 2, column + j - k // 2
            if 0 <= top < H and 0 <= left < W:
                out[:, n] += weight[:, 0, i, j] * x[:, prefix + top * W + left]
    return out


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convpos(2, (4, 5), 3), id="window_3"),
        pytest.param(convpos(1, (2, 6), 2, window=5, prefix=0), id="window_5"),
        pytest.param(convpos(1, (3, 1), 2, bias=False, prefix=3), id="no_bias"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64, requires_grad=False)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, encoding_by_loops(case, tensors))


def test_reference_twice_differentiable() -> None:
    case = convpos(1, (2, 3), 2)
    tensors = list(case.tensors(torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda *t: case.reference(*t, **case.options), tensors)


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convpos(2, (3, 4), 3), id="window_3"),
        pytest.param(convpos(1, (2, 3), 2, window=5, prefix=0), id="window_5"),
        pytest.param(convpos(1, (1, 4), 2, bias=False, prefix=2), id="no_bias"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return conv_position_encoding(*tensors, backend=backend, **case.options)

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(conv_position_encoding, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    conv_position_encoding(**tensors, backend=backend, **SMALL.options).backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
def test_grad_out_of_a_sum(backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = convpos(2, (9, 8), 19, window=5)
    tensors = case.tensors(torch.float64)
    ones = torch.ones(case.out_shape, dtype=torch.float64)
    dense = run(case.function, tensors, ones, backend=backend, **case.options)
    case.function(**tensors, backend=backend, **case.options).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, dense[name], msg=name)


# ----------------------------------------------------------------------- layouts, determinism


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend: str) -> None:
    case = convpos(2, (5, 8), 19)
    tensors = case.tensors(torch.float64, requires_grad=False)
    tensors["x"] = layout(tensors["x"])
    tensors["weight"] = tensors["weight"].mT.contiguous().mT
    grad_out = layout(case.grad_out(torch.float64))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_contiguous(layout, backend: str) -> None:
    tensors = SMALL.tensors(torch.float32, requires_grad=False)
    tensors["x"] = layout(tensors["x"])
    assert conv_position_encoding(**tensors, backend=backend, **SMALL.options).is_contiguous()


@backends
def test_output_is_no_view_of_the_input(backend: str) -> None:
    """Not even where there is nothing to add."""
    x, weight = torch.randn(2, 5, 4), torch.zeros(4, 1, 3, 3)
    before = x.clone()
    out = conv_position_encoding(x, weight, grid=(2, 2), backend=backend)
    assert torch.equal(out, x)
    out.zero_()
    assert torch.equal(x, before)


@backends
@dtypes
def test_twice_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    case = convpos(3, (13, 11), 40)
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    first, second = (
        run(case.function, tensors, grad_out, backend=backend, **case.options) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@native
@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convpos(1, (14, 14), 64), id="batch_1"),
        pytest.param(convpos(3, (7, 9), 35, window=5), id="batch_3"),
        pytest.param(convpos(1, (60, 56), 16), id="many_tokens"),
    ],
)
def test_threads_agree(case: Case, dtype: torch.dtype) -> None:
    """Bitwise: every sum is made of the same parts in the same order."""
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    for name, one in results[0].items():
        assert torch.equal(one, results[1][name]), name
        assert torch.equal(one, results[2][name]), name


# ------------------------------------------------------------------------------- special values


@backends
@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_prefix_tokens_pass_unchanged(value: float, dtype: torch.dtype, backend: str) -> None:
    """Bitwise, and nothing of them reaches the image."""
    case = convpos(2, (4, 5), 19, prefix=3)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][:, :3, 4] = value
    out = conv_position_encoding(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out[:, :3], tensors["x"][:, :3], rtol=0, atol=0, equal_nan=True)
    assert out[:, 3:].isfinite().all()


@backends
@dtypes
def test_nan_stays_in_its_window(dtype: torch.dtype, backend: str) -> None:
    case = convpos(2, (7, 9), 19)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][1, 1 + 6 * 9 + 3, 7] = math.nan  # (6, 3) on the last row
    out = conv_position_encoding(**tensors, backend=backend, **case.options)
    expected = torch.zeros(2, 7, 9, 19, dtype=torch.bool)
    expected[1, 5:, 2:5, 7] = True
    assert torch.equal(out[:, 1:].isnan().unflatten(1, (7, 9)), expected)


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return convpos(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        draw(st.integers(1, 70)),
        window=draw(st.sampled_from([1, 3, 3, 5, 7, 9])),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 1, 1, 3])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str) -> None:
    check_isa("convpos", isa)


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in ConvPositionEncoding(64).state_dict().items()}
    assert shapes == {"proj.weight": (64, 1, 3, 3), "proj.bias": (64,)}


@backends
@pytest.mark.parametrize("window", [1, 3, 5])
def test_module_is_the_function(window: int, backend: str) -> None:
    module = ConvPositionEncoding(8, window, num_prefix_tokens=2, backend=backend)
    x = torch.randn(2, 2 + 5 * 7, 8)
    want = conv_position_encoding_reference(
        x, module.proj.weight, module.proj.bias, grid=(5, 7), num_prefix_tokens=2
    )
    torch.testing.assert_close(module(x, (5, 7)), want)


@backends
def test_module_gradients_reach_every_parameter(backend: str) -> None:
    module = ConvPositionEncoding(8, backend=backend)
    module(torch.randn(2, 1 + 5 * 7, 8), (5, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
