"""BatchNorm over rows of channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xattn_ops._batch_norm import BatchNorm1d, BatchNorm2d, _BatchNorm


def pair(channels: int, **options: Any) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours, and torch's in float64 with the same parameters."""
    ours, plain = BatchNorm2d(channels, **options), nn.BatchNorm2d(channels, **options)
    if ours.affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain.double()


def channels_last(*shape: int) -> Tensor:
    return (torch.randn(shape) + 0.3).contiguous(memory_format=torch.channels_last)


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], grad)]


def errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(values, exact, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.fixture
def served(monkeypatch) -> list[int]:
    """Grows with each call of our own kernel."""
    calls: list[int] = []
    apply = _BatchNorm.apply
    monkeypatch.setattr(_BatchNorm, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("shift", [0.3, 30.0])
@pytest.mark.parametrize(
    ("shape", "better"),
    [
        pytest.param((8, 5, 112, 112), 5, id="large"),
        pytest.param((2, 48, 56, 56), 2, id="medium"),
        pytest.param((3, 7, 9, 5), 0.5, id="odd"),
        pytest.param((2, 4, 1, 1), 0.1, id="two-samples"),
    ],
)
def test_results_are_more_exact_than_torch_s_own_in_this_layout(shape, better, shift, served):
    ours, plain = pair(shape[1])
    same = copy.deepcopy(plain).float()
    x, grad = channels_last(*shape) + shift, channels_last(*shape)
    exact = results(plain, x.double(), grad.double())
    got = results(ours, x, grad)
    assert served
    assert {t.dtype for t in got} == {torch.float32}
    for error, torchs in zip(
        errors(got, exact), errors(results(same, x, grad), exact), strict=True
    ):
        assert error <= torchs / better + 5e-7
    for (key, value), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"eps": 0.5}], ids=str)
def test_running_statistics_follow_the_batches(options):
    ours, plain = pair(3, **options)
    for _ in range(3):
        x = channels_last(4, 3, 5, 6)
        torch.testing.assert_close(ours(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5)
    assert ours.num_batches_tracked == 3
    x = channels_last(1, 3, 5, 6)
    for one, other in (
        (ours.running_mean, plain.running_mean),
        (ours.running_var, plain.running_var),
        (ours.eval()(x), plain.eval()(x.double())),
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_without_running_statistics():
    ours, plain = pair(3, track_running_stats=False)
    for norm in (ours, plain):
        norm.eval()  # uses the batch's in evaluation too
    x = channels_last(4, 3, 5, 6)
    for mode in (False, True):
        ours.train(mode), plain.train(mode)
        torch.testing.assert_close(ours(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(4, 3, 5, 6), id="contiguous"),
        pytest.param(channels_last(4, 3, 5, 6).double(), id="float64"),
        pytest.param(channels_last(4, 3, 5, 6).bfloat16(), id="bfloat16"),
        pytest.param(channels_last(4, 3, 5, 12)[..., ::2], id="strided"),
    ],
)
def test_other_inputs_are_left_to_torch(x, served):
    ours, plain = pair(3)
    tolerance = 0.05 if x.dtype == torch.bfloat16 else 1e-5
    y = ours.to(x.dtype)(x)
    assert not served
    torch.testing.assert_close(y.double(), plain(x.double()), rtol=tolerance, atol=tolerance)


def test_without_scale_and_shift():
    ours, plain = pair(3, affine=False)
    x = channels_last(4, 3, 5, 6)
    torch.testing.assert_close(ours(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_asks_for_and_strided_ones():
    ours, plain = pair(3)
    ours.weight.requires_grad_(False)
    x = channels_last(4, 3, 5, 6).requires_grad_()
    twin = x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(ours(x)[..., ::2].square().sum(), [x])
    (expected,) = torch.autograd.grad(plain(twin)[..., ::2].square().sum(), [twin])
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_maps_of_one_column(served):
    rows, grad = torch.randn(1568, 6), torch.randn(1568, 6)
    maps, _ = pair(6)
    norm = BatchNorm1d(6)
    norm.load_state_dict(maps.state_dict())
    ours = results(norm, rows, grad)
    as_map = [
        t.T[None, :, None].contiguous(memory_format=torch.channels_last) for t in (rows, grad)
    ]
    y, dx, *rest = results(maps, *as_map)
    assert len(served) == 2
    expected = [y[0, :, 0].T, dx[0, :, 0].T, *rest]
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(norm.running_var, maps.running_var)


@pytest.mark.parametrize("x", [torch.randn(6, 5).T, torch.randn(2, 6, 3)], ids=["strided", "3d"])
def test_other_rows_are_left_to_torch(x, served):
    torch.testing.assert_close(BatchNorm1d(6)(x), nn.BatchNorm1d(6)(x))
    assert not served


def test_one_sample_a_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchNorm2d(3)(channels_last(1, 3, 1, 1))


def test_two_runs_are_bitwise_equal():
    x, grad = channels_last(2, 8, 30, 31), channels_last(2, 8, 30, 31)
    norm, _ = pair(8)
    first, second = (results(copy.deepcopy(norm), x, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
