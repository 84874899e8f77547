"""inner_patch_attention: values, gradients, layouts, dropout, and its module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.ipsa import CASES, DROPOUT, SMALL, ipsa
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import InnerPatchAttention, inner_patch_attention
from xattn_ops.ipsa import inner_patch_attention_reference

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@backends
@dtypes
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend)


@backends
@dtypes
@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend, seed=5)


# ------------------------------------------------------------------------- the reference itself


def attention_by_loops(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The definition, pixel by pixel; shares nothing with the reference."""
    qkv, table, pad = tensors["qkv"], tensors["bias_table"], tensors["pad_qkv"]
    B, H, W, C3 = qkv.shape
    heads, (wh, ww) = case.options["num_heads"], case.options["window"]
    sh, sw = case.options.get("shift", (0, 0))
    C, D = C3 // 3, C3 // 3 // heads
    Hp, Wp = math.ceil(H / wh) * wh, math.ceil(W / ww) * ww

    def place(y: int, x: int) -> tuple[int, int, bool, bool]:
        """Row and column after the roll, and whether they went around the edge."""
        return (y - sh) % Hp, (x - sw) % Wp, y < sh, x < sw

    out = torch.empty(B, H, W, C, dtype=qkv.dtype)
    for b, y, x, h in (
        (b, y, x, h) for b in range(B) for y in range(H) for x in range(W) for h in range(heads)
    ):
        ry, rx, *around = place(y, x)
        logits, values = [], []
        for ky, kx in ((ky, kx) for ky in range(Hp) for kx in range(Wp)):
            rky, rkx, *key_around = place(ky, kx)
            if (rky // wh, rkx // ww) != (ry // wh, rx // ww) or key_around != around:
                continue
            token = qkv[b, ky, kx] if ky < H and kx < W else pad
            row = (ry - rky + wh - 1) * (2 * ww - 1) + rx - rkx + ww - 1
            q, k = qkv[b, y, x, h * D : h * D + D], token[C + h * D : C + h * D + D]
            logits.append(q @ k / math.sqrt(D) + table[row, h])
            values.append(token[2 * C + h * D : 2 * C + h * D + D])
        out[b, y, x, h * D : h * D + D] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ipsa(2, 5, 7, 2, 3, window=(2, 3)), id="padded"),
        pytest.param(ipsa(1, 6, 6, 1, 4, window=(3, 2), shift=(2, 1)), id="shifted"),
        pytest.param(ipsa(1, 5, 7, 2, 2, window=(3, 4), shift=(1, 3)), id="padded_shifted"),
        pytest.param(ipsa(1, 3, 2, 1, 2, window=(4, 5), shift=(3, 2)), id="one_window_shifted"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, attention_by_loops(case, tensors))


def test_shift_masks_as_swin_does() -> None:
    """Swin numbers nine regions by slices and forbids attention between different numbers."""
    from xattn_ops.ipsa.reference import same_region

    image = torch.zeros(14, 21)
    cuts = (slice(0, -7), slice(-7, -3), slice(-3, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        image[rows, columns] = number
    windows = image.reshape(2, 7, 3, 7).permute(0, 2, 1, 3).reshape(6, 49)
    swin = windows[:, :, None] == windows[:, None]
    assert torch.equal(same_region(14, 21, (7, 7), (3, 3), torch.device("cpu")), swin)


def test_reference_twice_differentiable() -> None:
    case = ipsa(1, 3, 4, 1, 2, window=(2, 3), shift=(1, 1))
    tensors = list(case.tensors(torch.float64).values())

    def function(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor) -> Tensor:
        return case.reference(qkv, bias_table, pad_qkv=pad_qkv, **case.options)

    assert torch.autograd.gradgradcheck(function, tensors)


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ipsa(1, 3, 4, 2, 1, window=(2, 3)), id="padded"),
        pytest.param(ipsa(1, 3, 4, 1, 2, window=(3, 2), shift=(1, 1)), id="shifted"),
        pytest.param(ipsa(1, 3, 3, 1, 2, window=(2, 2), dropout_p=0.4), id="dropout"),
        pytest.param(ipsa(1, 3, 3, 1, 2, window=(2, 2), scale=0.0), id="scale_zero"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    def function(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor) -> Tensor:
        torch.manual_seed(3)
        return inner_patch_attention(
            qkv, bias_table, pad_qkv=pad_qkv, backend=backend, **case.options
        )

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", ["qkv", "bias_table", "pad_qkv"])
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(inner_patch_attention, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = inner_patch_attention(**tensors, backend=backend, **SMALL.options)
    out.backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
def test_grad_out_of_a_sum(backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = ipsa(2, 9, 8, 2, 8, shift=(3, 3))
    tensors = case.tensors(torch.float32)
    dense = run(case.function, tensors, torch.ones(case.out_shape), backend=backend, **case.options)
    case.function(**tensors, backend=backend, **case.options).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, dense[name], msg=name)


# --------------------------------------------------------------------------------------- layouts


@backends
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.mT.contiguous().mT, id="channels_strided"),
        pytest.param(lambda t: t.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), id="mixed"),
        pytest.param(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), id="columns_first"),
        pytest.param(lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]], id="wider_rows"),
        pytest.param(lambda t: torch.stack([t, t + 1], -1)[..., 0], id="every_other"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded_batch"),
        pytest.param(lambda t: t[:, :, :1].expand_as(t), id="expanded_columns"),
        pytest.param(
            lambda t: torch.cat([t[:1, :1, :1].reshape(-1), t.flatten()])[-t.numel() :].view_as(t),
            id="offset",
        ),
    ],
)
def test_layouts(layout, backend: str) -> None:
    case = ipsa(2, 9, 8, 2, 8, window=(4, 3), shift=(1, 2))
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"] = layout(tensors["qkv"])
    grad_out = layout(case.grad_out(torch.float32))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
def test_output_is_contiguous(backend: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    assert inner_patch_attention(**tensors, backend=backend, **SMALL.options).is_contiguous()


# ---------------------------------------------------------------------------------- determinism


@backends
@dtypes
def test_twice_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    case = ipsa(3, 16, 17, 3, 32, shift=(3, 3), dropout_p=0.2)
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(case.function, tensors, grad_out, backend=backend, **case.options))
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


@native
@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ipsa(1, 14, 14, 2, 32), id="batch_1"),
        pytest.param(ipsa(3, 16, 17, 3, 16, shift=(3, 3)), id="batch_3"),
    ],
)
def test_threads_agree(case: Case, dtype: torch.dtype) -> None:
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    assert torch.equal(results[0]["out"], results[1]["out"])
    for name, one in results[0].items():
        torch.testing.assert_close(one, results[1][name], msg=name)


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(50.0, id="50"), pytest.param(-50.0, id="-50")])
def test_extreme_logits(size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: logits of thousands give finite, right weights."""
    check_against_float64(ipsa(16, 9, 10, 2, 8, scale=size), dtype, backend)


@backends
def test_weights_sum_to_one(backend: str) -> None:
    """With v = 1 everywhere, the padding too, the output is 1."""
    case = ipsa(2, 9, 11, 2, 8, shift=(3, 2))
    tensors = case.tensors(torch.float32, requires_grad=False)
    for name in ("qkv", "pad_qkv"):
        tensors[name][..., 32:] = 1
    out = inner_patch_attention(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


@backends
@dtypes
def test_nan_stays_in_its_window(dtype: torch.dtype, backend: str) -> None:
    case = ipsa(2, 14, 21, 2, 8)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][1, 8, 9, :8] = math.nan  # the query of head 0
    tensors["qkv"][0, 0, 20, 40:] = math.nan  # the value of head 1
    out = inner_patch_attention(**tensors, backend=backend, **case.options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 8, 9, :8] = True
    expected[0, :7, 14:, 8:] = True
    assert torch.equal(out.isnan(), expected)


@backends
def test_infinite_key_gives_nan_where_the_formula_does(backend: str) -> None:
    case = ipsa(1, 7, 14, 1, 8)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"][0, 3, 3, 8:16] = math.inf
    want = inner_patch_attention_reference(**tensors, **case.options)
    got = inner_patch_attention(**tensors, backend=backend, **case.options)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    size = st.integers(1, 5)
    window = (draw(size), draw(size))
    shift = (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1)))
    return ipsa(
        draw(st.integers(0, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 20)),
        window=window,
        bias=draw(st.booleans()),
        pad=draw(st.booleans()),
        shift=shift,
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str) -> None:
    check_isa("ipsa", isa)


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in InnerPatchAttention(8, 2, (3, 5)).state_dict().items()}
    assert shapes == {
        "relative_position_bias_table": (45, 2),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_module_pads_with_zero_tokens(qkv_bias: bool) -> None:
    """Padding the qkv with its bias is padding the tokens with zeros."""
    module = InnerPatchAttention(8, 2, (4, 3), (1, 2), qkv_bias=qkv_bias).double().eval()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    whole = torch.zeros(2, 8, 9, 8, dtype=torch.float64)
    whole[:, :5, :7] = x
    torch.testing.assert_close(module(x), module(whole)[:, :5, :7])


@backends
def test_module_gradients_reach_every_parameter(backend: str) -> None:
    module = InnerPatchAttention(8, 2, (4, 3), backend=backend)
    module(torch.randn(2, 5, 7, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_module_dropout_in_training_alone() -> None:
    module = InnerPatchAttention(8, 2, (4, 3), attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 5, 7, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("drop", ["attn_drop", "proj_drop"])
def test_module_dropout_follows_manual_seed(drop: str) -> None:
    module = InnerPatchAttention(8, 2, (4, 3), **{drop: 0.5})
    x, outs = torch.randn(2, 5, 7, 8), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(module(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
