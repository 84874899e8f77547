"""What is particular to token_merge_enhance: its two outputs, prefix tokens, short formats, BN."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from support.cases import Case, assert_same, backends, dtypes, leaves, native
from support.merge import SMALL, merge
from torch import Tensor, nn

from xattn_ops import TokenMergeEnhance, token_merge_enhance
from xattn_ops.digest import token_merge_enhance_reference

# ------------------------------------------------------------------------------- the two outputs


@backends
@pytest.mark.parametrize("output", [0, 1], ids=["digests", "enhanced"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SMALL, id="prefix"),
        pytest.param(merge(2, (14, 9), 19, window=5, stride=2, enhance=5), id="window_5"),
    ],
)
def test_gradient_of_one_output_alone(case: Case, output: int, backend: str) -> None:
    """The other's weights have none, or zeros."""
    tensors, grad_out = case.tensors(torch.float64), case.grad_outs(torch.float64)[output]

    def gradients(result: list[Tensor]) -> dict[str, Tensor]:
        inputs = list(tensors.values())
        grads = torch.autograd.grad(result[output], inputs, grad_out, materialize_grads=True)
        return dict(zip(tensors, grads, strict=True))

    got = gradients(case.outputs(tensors, backend=backend))
    assert_same(got, gradients(case.outputs(tensors, case.reference)))
    others = ["enhance_weight", "enhance_bias"] if output == 0 else ["merge_weight"]
    assert all(got[name].abs().max() == 0 for name in others)


@backends
@dtypes
def test_outputs_do_not_depend_on_each_other(dtype: torch.dtype, backend: str) -> None:
    """Without a merge weight the first is None, and the second the same bit for bit."""
    tensors = SMALL.tensors(dtype, requires_grad=False)
    digests, enhanced = token_merge_enhance(**tensors, **SMALL.options, backend=backend)
    without = tensors | {"merge_weight": None}
    none, alone = token_merge_enhance(**without, **SMALL.options, backend=backend)
    assert none is None
    assert torch.equal(alone, enhanced)
    changed = tensors | {"enhance_weight": torch.zeros(8, 1, 1, 1, dtype=dtype)}
    again, _ = token_merge_enhance(**changed, **SMALL.options, backend=backend)
    assert torch.equal(again, digests)


@backends
def test_digests_are_every_stride_th_of_a_dense_convolution(backend: str) -> None:
    tensors = {name: t.detach() for name, t in SMALL.tensors(torch.float64).items()}
    options = {"grid": (5, 8), "num_prefix_tokens": 1, "backend": backend}
    dense, _ = token_merge_enhance(**tensors, **options, stride=1)
    for stride in (2, 3, 4, 8, 9):
        got, _ = token_merge_enhance(**tensors, **options, stride=stride)
        want = dense.unflatten(1, (5, 8))[:, ::stride, ::stride].flatten(1, 2)
        torch.testing.assert_close(got, want)


@backends
def test_outputs_are_no_views_of_the_input(backend: str) -> None:
    """Not even where nothing changes."""
    x, one = torch.randn(2, 6, 4), torch.ones(4, 1, 1, 1)
    before = x.clone()
    outs = token_merge_enhance(
        x, one, one, grid=(2, 2), stride=1, num_prefix_tokens=2, backend=backend
    )
    assert torch.equal(outs[0], x[:, 2:])
    assert torch.equal(outs[1], x)
    for out in outs:
        assert out.is_contiguous()
        out.zero_()
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------- special values


@backends
@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_prefix_tokens_pass_unchanged(value: float, dtype: torch.dtype, backend: str) -> None:
    """Bitwise, and nothing of them reaches the image or the digests."""
    case = merge(2, (4, 5), 19, prefix=3)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][:, :3, 4] = value
    digests, out = token_merge_enhance(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out[:, :3], tensors["x"][:, :3], rtol=0, atol=0, equal_nan=True)
    assert out[:, 3:].isfinite().all()
    assert digests.isfinite().all()


@backends
@dtypes
def test_nan_stays_in_the_windows_that_see_it(dtype: torch.dtype, backend: str) -> None:
    case = merge(2, (13, 15), 19, prefix=1)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][1, 1 + 12 * 15 + 5, 7] = math.nan  # (12, 5) on the last row
    digests, out = token_merge_enhance(**tensors, backend=backend, **case.options)
    enhanced = torch.zeros(2, 13, 15, 19, dtype=torch.bool)
    enhanced[1, 11:, 4:7, 7] = True
    assert torch.equal(out[:, 1:].isnan().unflatten(1, (13, 15)), enhanced)
    merged = torch.zeros(2, 4, 4, 19, dtype=torch.bool)
    merged[1, 3, 1:3, 7] = True  # windows around (12, 4) and (12, 8)
    assert torch.equal(digests.isnan().unflatten(1, (4, 4)), merged)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_gradients_of_tiny_maps_in_short_formats(dtype: torch.dtype, backend: str) -> None:
    """Against float64 with a fixed tolerance: conv2d of some torch versions errs without limit.

    There parts of the weight's gradient stay uninitialised, in bfloat16, where a strided depthwise
    window has taps that never touch the map.
    """
    wrong = []
    sizes = product((1, 2, 3, 5), (1, 2, 4), (3, 5, 7), (1, 2, 3, 4), (5, 16))
    for rows, columns, window, stride, channels in sizes:
        case = merge(2, (rows, columns), channels, window=window, stride=stride)
        tensors, grad_outs = case.tensors(dtype), case.grad_outs(dtype)
        wide = leaves({name: t.double() for name, t in tensors.items()})
        exact = case.run(wide, [g.double() for g in grad_outs], case.reference)
        got = case.run(tensors, grad_outs, backend=backend)
        for name, want in exact.items():
            error = (got[name] - want).abs().max().item()
            if not error <= 2 * torch.finfo(dtype).eps * want.abs().max().item():
                wrong.append((rows, columns, window, stride, channels, name, error))
    assert not wrong


# --------------------------------------------------------------------------------------- module


def trained(dim: int = 8, **options: object) -> TokenMergeEnhance:
    """A module in float64 whose batch norm has something to fold."""
    module = TokenMergeEnhance(dim, **options).double()
    norm = module.local_conv.bn
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in TokenMergeEnhance(64).state_dict().items()}
    assert shapes == {
        "dw_conv.weight": (64, 1, 7, 7),
        "local_conv.c.weight": (64, 1, 3, 3),
        "local_conv.bn.weight": (64,),
        "local_conv.bn.bias": (64,),
        "local_conv.bn.running_mean": (64,),
        "local_conv.bn.running_var": (64,),
        "local_conv.bn.num_batches_tracked": (),
    }
    assert "dw_conv.weight" not in TokenMergeEnhance(64, merge=False).state_dict()


@backends
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_module_is_the_official_block_s_convolutions(
    training: bool, prefix: int, backend: str
) -> None:
    """Two convolutions of a map and a batch norm after the second, with all their gradients."""
    module = trained(num_prefix_tokens=prefix, backend=backend).train(training)
    norm = nn.BatchNorm2d(8).double().train(training)
    norm.load_state_dict(module.local_conv.bn.state_dict())
    convs = module.dw_conv.weight, module.local_conv.c.weight
    x = torch.randn(3, prefix + 5 * 7, 8).double().requires_grad_()

    image = x[:, prefix:].mT.unflatten(-1, (5, 7))
    tokens = norm(module.local_conv.c(image)).flatten(2).mT
    want = [module.dw_conv(image).flatten(2).mT, torch.cat([x[:, :prefix], tokens], 1)]
    got = module(x, (5, 7))
    torch.testing.assert_close(list(got), want)

    grads = [torch.randn_like(out) for out in want]
    own = (x, *convs, module.local_conv.bn.weight, module.local_conv.bn.bias)
    other = (x, *convs, norm.weight, norm.bias)
    expected = torch.autograd.grad(want, other, grads)
    torch.testing.assert_close(torch.autograd.grad(got, own, grads), expected)
    assert_same(dict(module.local_conv.bn.state_dict()), dict(norm.state_dict()))


@backends
def test_module_without_a_merge(backend: str) -> None:
    module = trained(merge=False, backend=backend)
    digests, tokens = module(torch.randn(2, 35, 8).double(), (5, 7))
    assert digests is None
    assert tokens.shape == (2, 35, 8)


@backends
@pytest.mark.parametrize("window", [3, 5])
def test_module_windows_and_stride(window: int, backend: str) -> None:
    options = {"window": window, "stride": 2, "enhance_window": 5, "backend": backend}
    module = trained(**options).eval()
    x, norm = torch.randn(2, 35, 8).double(), module.local_conv.bn
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    want = token_merge_enhance_reference(
        x,
        module.dw_conv.weight,
        module.local_conv.c.weight * scale.view(-1, 1, 1, 1),
        norm.bias - norm.running_mean * scale,
        grid=(5, 7),
        stride=2,
    )
    torch.testing.assert_close(module(x, (5, 7)), want)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_module_in_bfloat16_and_under_autocast(training: bool) -> None:
    """Folding is done in float32 at least, then everything in bfloat16."""
    module = trained().float().train(training)
    x = torch.randn(2, 35, 8)
    want = module(x, (5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x, (5, 7))
    short = module.bfloat16()(x.bfloat16(), (5, 7))
    for outs in (cast, short):
        assert [out.dtype for out in outs] == [torch.bfloat16] * 2
        torch.testing.assert_close([out.float() for out in outs], list(want), rtol=0.05, atol=0.1)


@native
def test_a_frozen_batch_norm_is_folded_while_the_module_trains() -> None:
    module = trained()
    module.local_conv.bn.eval()
    x = torch.randn(2, 35, 8).double()
    before = module.local_conv.bn.running_mean.clone()
    got = module(x, (5, 7))
    assert torch.equal(module.local_conv.bn.running_mean, before)
    torch.testing.assert_close(got, module.eval()(x, (5, 7)))
