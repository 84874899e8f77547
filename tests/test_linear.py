"""The models' linear and MLP: all of their paths against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.linears import compare, linear_inputs, mlp_inputs, plain_linear, plain_mlp, random
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import _linear, _linear_ops
from xattn_ops._linear import linear, mlp

HAS_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch is built without oneDNN")
SHAPES = [
    pytest.param((2, 50, 31), 96, 288, id="wide"),
    pytest.param((2, 50, 31), 96, 96, id="square"),
    pytest.param((4, 13, 7), 160, 40, id="narrow"),
    pytest.param((5,), 33, 65, id="few-rows"),
    pytest.param((), 16, 8, id="vector"),
    pytest.param((3, 1, 1, 2), 7, 1, id="one-output"),
    pytest.param((0, 3), 16, 32, id="empty"),
]


@pytest.fixture(params=[pytest.param("onednn", marks=needs_onednn), "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_linear, "PREFER_ONEDNN", request.param == "onednn")
    monkeypatch.setattr(_linear, "PLAIN", False)
    return request.param


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "PREFER_ONEDNN", True)
    monkeypatch.setattr(_linear, "PLAIN", False)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_linear_matches_float64(path, rows, k, n, activation):
    inputs = linear_inputs(rows, k, n)
    compare(lambda *a: linear(*a, activation), lambda *a: plain_linear(*a, activation), inputs)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_without_gradients_the_same_numbers(path, activation):
    x, w, b = linear_inputs((3, 40), 48, 72)
    with torch.no_grad():
        torch.testing.assert_close(
            linear(x, w, b, activation), plain_linear(x, w, b, activation), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(linear(x, w), F.linear(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("rows", "k", "hidden", "n"),
    [
        pytest.param((2, 40, 41), 24, 96, 24, id="chunks"),
        pytest.param((1, 500), 32, 16, 48, id="bottleneck"),
        pytest.param((3,), 20, 80, 20, id="few-rows"),
        pytest.param((0, 4), 8, 32, 8, id="empty"),
    ],
)
def test_mlp_matches_float64(path, monkeypatch, rows, k, hidden, n, keep):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", keep)
    monkeypatch.setattr(_linear_ops, "CHUNK_ELEMENTS", 20_000)
    compare(mlp, plain_mlp, mlp_inputs(rows, k, hidden, n))
    compare(mlp, plain_mlp, mlp_inputs(rows, k, hidden, n)[:5])


def test_mlp_without_gradients_in_chunks(path, monkeypatch):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 0)
    monkeypatch.setattr(_linear_ops, "CHUNK_ELEMENTS", 2_000)
    inputs = [t.detach() for t in mlp_inputs((3, 211), 24, 40, 24)]
    assert len(_linear_ops._chunks(633, 40)) > 3
    torch.testing.assert_close(mlp(*inputs), plain_mlp(*inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp(*inputs[:5]), plain_mlp(*inputs[:5]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_large_hidden_activations(path, monkeypatch, training):
    """Neither a whole hidden activation nor its gradient is ever asked for."""
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 10_000)
    monkeypatch.setattr(_linear_ops, "LARGEST_CHUNK", 2_000)
    inputs = [t.detach().requires_grad_(training) for t in mlp_inputs((900,), 8, 32, 8)]
    with torch.profiler.profile(profile_memory=True) as profile:
        y = mlp(*inputs)
        if training:
            y.sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 900 * 8 * 4 <= largest < 900 * 32 * 4


def test_chunks_stay_below_what_malloc_maps(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 128)
    rows = [part.stop - part.start for part in _linear_ops._chunks(1 << 20, 512)]
    assert sum(rows) == 1 << 20
    assert max(rows) * 512 * 4 < 1 << 25


def test_mlp_whose_residual_is_its_input(path, monkeypatch):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 0)
    x, *weights = mlp_inputs((2, 9), 16, 64, 16)[:5]
    (ours,) = torch.autograd.grad(mlp(x, *weights, x).square().sum(), x)
    (plain,) = torch.autograd.grad(plain_mlp(x, *weights, x).square().sum(), x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), id="transposed"),
        pytest.param(lambda t: torch.stack([t, t], -1)[..., 0], id="strided"),
        pytest.param(lambda t: F.pad(t, (3, 2))[..., 3:-2], id="sliced"),
    ],
)
def test_views(path, view):
    inputs = linear_inputs((9, 11), 24, 40)
    compare(lambda x, w, b: linear(view(x), view(w), b), plain_linear, inputs)
    compare(
        lambda *a: mlp(*[view(t) if t.dim() > 1 else t for t in a]),
        plain_mlp,
        mlp_inputs((9, 11), 24, 40, 24),
    )


def test_expanded_gradient(path):
    inputs = linear_inputs((9, 11), 24, 40)
    compare(linear, plain_linear, inputs, torch.ones(()).expand(9, 11, 40))
    compare(mlp, plain_mlp, mlp_inputs((9, 11), 24, 40, 8), torch.ones(1, 11, 1).expand(9, 11, 8))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_only_asked_gradients(path, frozen):
    inputs = linear_inputs((6, 5), 8, 12)
    for i in frozen:
        inputs[i] = inputs[i].detach()
    linear(*inputs).sum().backward()
    for i, t in enumerate(inputs):
        assert (t.grad is None) == (i in frozen)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3, 4), (1, 2, 3, 4)], ids=str)
def test_only_asked_mlp_gradients(path, frozen):
    inputs = mlp_inputs((6, 5), 8, 12, 8)
    everything = torch.autograd.grad(mlp(*inputs).square().sum(), inputs)
    for i in frozen:
        inputs[i] = inputs[i].detach()
    mlp(*inputs).square().sum().backward()
    for i, (t, expected) in enumerate(zip(inputs, everything, strict=True)):
        assert (t.grad is None) == (i in frozen)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected)


def test_float64_gradcheck():
    inputs = [t.detach().double().requires_grad_() for t in mlp_inputs((3, 2), 4, 6, 5)]
    assert torch.autograd.gradcheck(mlp, inputs)
    assert torch.autograd.gradgradcheck(mlp, inputs)
    x, w, b = inputs[:3]
    assert torch.autograd.gradcheck(lambda *a: linear(*a, "gelu"), (x, w, b))


def test_repeats_to_the_bit(path):
    inputs = mlp_inputs((4, 300), 32, 128, 32)
    runs = [torch.autograd.grad(mlp(*inputs).sum(), inputs) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(path, monkeypatch, dynamic):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 0)
    torch._dynamo.reset()

    def function(x, w, b, w2, b2):
        return mlp(linear(x, w2, None, "gelu"), w, b, w2, b2, linear(x, w2))

    w2 = random(24, 24)
    inputs = [random(2, 5, 24), random(24, 24), random(24), w2, random(24)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        inputs[0] = random(2, rows, 24)
        ours = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        plain = torch.autograd.grad(function(*inputs).sum(), inputs)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_leaf_operators_pass_opcheck(path):
    x, w1, b1, w2, b2, residual = [t.detach() for t in mlp_inputs((2, 6), 8, 12, 8)]
    ops, grad, hidden = torch.ops.xattn_ops, torch.randn(2, 6, 8), torch.randn(12, 12)
    onednn = path == "onednn"
    for op, arguments in (
        (ops.mlp_fwd, (x, w1, b1, w2, b2, residual, True, onednn)),
        (ops.mlp_fwd, (x, w1, b1, w2, b2, None, False, onednn)),
        (ops.mlp_bwd, (grad, x, w1, b1, w2, hidden, [True] * 5, onednn)),
        (ops.mlp_bwd, (grad, x, w1, b1, w2, hidden[:0], [False] + [True] * 4, onednn)),
    ):
        torch.library.opcheck(op, arguments)


@needs_onednn
def test_linear_leaf_operators_pass_opcheck():
    x, w1, b1 = [t.detach() for t in linear_inputs((2, 6), 8, 12)]
    ops, hidden = torch.ops.xattn_ops, torch.randn(12, 12)
    for op, arguments in (
        (ops.onednn_linear_fwd, (x, w1, b1, True)),
        (ops.onednn_linear_fwd, (x, w1, None, False)),
        (ops.onednn_linear_bwd, (hidden.view(2, 6, 12), x, w1, [True, True, True])),
        (ops.onednn_linear_bwd, (hidden.view(2, 6, 12), x, w1, [False, True, False])),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["recompute", "keep"])
def test_flops_are_counted(path, monkeypatch, keep):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", keep)
    inputs = mlp_inputs((3, 5), 8, 12, 8)
    product = 2 * 15 * 8 * 12
    with FlopCounterMode(display=False) as counter:
        y = mlp(linear(inputs[0], random(8, 8)), *inputs[1:])
    assert counter.get_total_flops() == 2 * product + 2 * 15 * 8 * 8
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * product + 2 * (2 * 15 * 8 * 8)


def test_export_holds_standard_operators(path):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(mlp_inputs((1,), 8, 12, 8)[1:5])

        def forward(self, x):
            return mlp(linear(x, self.weights[2].matmul(self.weights[0])), *self.weights)

    layer, x = Layer(), torch.randn(2, 8)
    program = torch.export.export(layer, (x,))
    assert "xattn_ops" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_function_transforms(path):
    x, w, b = linear_inputs((4, 6), 8, 12)
    for each, whole in zip(
        torch.func.vmap(linear, (0, None, None))(x, w, b), linear(x, w, b), strict=True
    ):
        torch.testing.assert_close(each, whole)
    weights = torch.randn(4, 12, 8)
    torch.testing.assert_close(
        torch.func.vmap(linear)(x, weights), torch.einsum("brk,bnk->brn", x, weights)
    )
    grad = torch.func.grad(lambda w: linear(x, w, b, "gelu").sum())(w)
    torch.testing.assert_close(grad, torch.autograd.grad(plain_linear(x, w, b, "gelu").sum(), w)[0])
    _, tangent = torch.func.jvp(lambda x: linear(x, w, b), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), w))


def test_forward_mode(path):
    x, w, b = linear_inputs((4, 6), 8, 12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, w, b)).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), w))


@needs_onednn
def test_second_derivative_is_refused(onednn):
    x, w, b = linear_inputs((4, 6), 8, 12)
    (grad,) = torch.autograd.grad(linear(x, w, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_second_derivative_of_chunks_is_refused(path, monkeypatch):
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 0)
    x, *weights = mlp_inputs((4, 6), 8, 12, 8)
    (grad,) = torch.autograd.grad(mlp(x, *weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(path, dtype, grad):
    inputs = [t.detach().to(dtype).requires_grad_(grad) for t in mlp_inputs((4, 6), 8, 12, 8)]
    wide = [t.detach().double() for t in inputs]
    for ours, plain, exact in (
        (mlp(*inputs), plain_mlp(*inputs), plain_mlp(*wide)),
        (
            linear(*inputs[:3], "gelu"),
            plain_linear(*inputs[:3], "gelu"),
            plain_linear(*wide[:3], "gelu"),
        ),
    ):
        assert ours.dtype == dtype
        assert ours.requires_grad == grad
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_formats_are_multiplied_in_float32(monkeypatch, dtype):
    """One rounding, of the result; gradients and second derivatives come in the dtype that came."""
    monkeypatch.setattr(_linear, "SLOW_DTYPES", frozenset({dtype}))
    inputs = [t.detach().to(dtype).requires_grad_() for t in mlp_inputs((4, 6), 8, 12, 8)]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    for function, count in ((mlp, 6), (lambda *a: linear(*a, "gelu"), 3)):
        ours, exact = function(*inputs[:count]), function(*wide[:count])
        assert torch.equal(ours, exact.to(dtype))
        grads = torch.autograd.grad(ours.sum(), inputs[:count], create_graph=True)
        wanted = torch.autograd.grad(exact.sum(), wide[:count])
        assert all(torch.equal(g, w.to(dtype)) for g, w in zip(grads, wanted, strict=True))


def test_slow_formats_under_autocast_and_mixed(monkeypatch):
    monkeypatch.setattr(_linear, "SLOW_DTYPES", frozenset({torch.bfloat16}))
    x, w = torch.randn(4, 6), torch.randn(8, 6).bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):  # as F.linear has it
        linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, w), F.linear(x, w))


def test_autocast(path):
    x, w, b = linear_inputs((4, 6), 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
        assert mlp(*mlp_inputs((4,), 8, 12, 8)[:5]).dtype == torch.bfloat16


def test_onednn_switched_off(onednn):
    x, w, b = linear_inputs((4, 6), 8, 12)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b), rtol=0, atol=0)


def test_plain_layers(path, monkeypatch):
    """As the benchmark's baselines have them."""
    monkeypatch.setattr(_linear, "PLAIN", True)
    monkeypatch.setattr(_linear, "KEEP_ELEMENTS", 0)
    inputs = mlp_inputs((40, 6), 8, 12, 8)
    for fast, plain, count in ((linear, plain_linear, 3), (mlp, plain_mlp, 6)):
        y = fast(*inputs[:count])
        assert torch.equal(y, plain(*inputs[:count]))
        assert not y.grad_fn.name().startswith("_")  # no Function of ours


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(torch.ones(2, 3), torch.ones(4, 5)), r"weight is \[4, 5\].*\[2, 3\]"),
        (lambda: linear(torch.ones(2, 3), torch.ones(3)), r"weight is \[3\].*\[N, K\]"),
        (lambda: linear(torch.ones(()), torch.ones(3, 1)), r"for an input \[\]"),
        (lambda: linear(torch.ones(3), torch.ones(4, 3), torch.ones(3)), r"bias is \[3\].*\[4\]"),
        (lambda: linear(torch.ones(3), torch.ones(4, 3), None, "relu"), r"'relu'.*'gelu'"),
        (
            lambda: mlp(
                torch.ones(3), torch.ones(4, 3), torch.ones(4), torch.ones(2, 3), torch.ones(2)
            ),
            r"fc2_weight is \[2, 3\]",
        ),
        (
            lambda: mlp(
                torch.ones(3), torch.ones(4, 3), torch.ones(4), torch.ones(2, 4), torch.ones(3)
            ),
            r"fc2_bias is \[3\].*\[2\]",
        ),
        (
            lambda: mlp(*(torch.ones(s) for s in ((3,), (4, 3), (4,), (2, 4), (2,), (3,)))),
            r"residual is \[3\]; the result is \[2\]",
        ),
    ],
)
def test_bad_input(path, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("value", "expected"),
    [("torch", "False"), ("onednn", str(bool(HAS_ONEDNN))), ("mkl", "'mkl' is ignored")],
)
def test_environment_chooses(value, expected):
    run = subprocess.run(
        [sys.executable, "-c", "from xattn_ops import _linear; print(_linear.PREFER_ONEDNN)"],
        env={**os.environ, "XATTN_LINEAR": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in run.stdout + run.stderr


def test_environment_leaves_slow_formats_to_torch():
    run = subprocess.run(
        [sys.executable, "-c", "from xattn_ops import _linear; print(len(_linear.SLOW_DTYPES))"],
        env={**os.environ, "XATTN_LINEAR": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "0\n"
