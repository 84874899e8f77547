"""Linear layers of the models, through oneDNN on the CPUs where that is the faster library.

In float32 PyTorch multiplies matrices with MKL, which uses half-width vectors on AMD processors
with AVX-512; oneDNN, built into the same PyTorch, uses full ones and can finish with GELU. There
`linear` and `mlp` take it, with gradients. Elsewhere, and for other dtypes, under autocast, in
function transforms, in exported programs and for tensor subclasses, they are plain `F.linear` and
`F.gelu`. In bfloat16 both libraries are the same, and oneDNN saves the pass for GELU where no
gradient is asked for. The environment variable XATTN_LINEAR=onednn|torch overrides the choice.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

# Rows of `mlp` go through in chunks whose hidden activations are this many elements a thread: they
# stay in cache, and no buffer grows past the size from which malloc maps it afresh on every call.
CHUNK_ELEMENTS = 1 << 19
# Hidden activations up to this many elements are kept for backward; larger ones are recomputed,
# which then costs less than the first touch of the memory, and saves it.
KEEP_ELEMENTS = 1 << 22


def _amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return "AuthenticAMD" in platform.processor()


def _prefer_onednn() -> bool:
    """Whether float32 linears go to oneDNN: on AMD with AVX-512, or as the user says."""
    choice = os.environ.get("XATTN_LINEAR", "")
    if choice not in ("", "onednn", "torch"):
        warnings.warn(
            f"XATTN_LINEAR={choice!r} is ignored; allowed are 'onednn' and 'torch'", stacklevel=2
        )
    if choice == "torch" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if choice == "onednn":
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _amd()


# Decided once, at import, by capability alone: a timing would make results vary between runs.
PREFER_ONEDNN = _prefer_onednn()
BF16 = PREFER_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _takes_onednn(*tensors: Tensor | None) -> bool:
    if (
        not PREFER_ONEDNN
        or torch.compiler.is_exporting()  # exported programs hold standard operators only
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or not torch.backends.mkldnn.enabled
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    if dtype != torch.float32 and (dtype != torch.bfloat16 or not BF16 or _needs_grad(*present)):
        return False
    return all(
        t.dtype == dtype
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and type(t) in (Tensor, torch.nn.Parameter)
        for t in present
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(x weight^T + bias).

    Args:
        x: [..., K], any dtype and device.
        weight: [N, K].
        bias: [N] or None.
        activation: None, or "gelu" for the exact (erf) GELU.

    Returns:
        [..., N]. On the oneDNN path gradients are differentiable once.

    Raises:
        ValueError: for an unknown activation, or shapes that do not fit.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}; allowed are None and 'gelu'")
    _check_shapes("weight", x, weight, bias)
    if not _takes_onednn(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if activation else y
    if _needs_grad(x, weight, bias):
        y = _Linear.apply(x, weight, bias)
        return F.gelu(y) if activation else y
    return torch.ops.xattn_ops.onednn_linear_fwd(x, weight, bias, activation == "gelu")


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a call of the layer is what torch's `kind` does: no class of its own, no hooks."""
    return type(layer) is kind and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); through `linear` where the layer is plain."""
    if not is_plain(layer):
        return layer(x)
    assert isinstance(layer, nn.Linear)
    return linear(x, layer.weight, layer.bias)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gelu(x W1^T + b1) W2^T + b2, chunk by chunk of the rows.

    Args:
        x: [..., K], any dtype and device.
        fc1_weight, fc1_bias: [H, K] and [H].
        fc2_weight, fc2_bias: [N, H] and [N].
        residual: [..., N] or None for no residual.

    Returns:
        [..., N]. On the oneDNN path gradients are differentiable once.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check_shapes("fc1_weight", x, fc1_weight, fc1_bias)
    _check_shapes("fc2_weight", fc1_weight.t(), fc2_weight, fc2_bias)
    if residual is not None and residual.shape != (*x.shape[:-1], fc2_weight.shape[0]):
        raise ValueError(
            f"residual is {list(residual.shape)}; the result is "
            f"{[*x.shape[:-1], fc2_weight.shape[0]]}"
        )
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
    if not _takes_onednn(*tensors):
        y = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        return y if residual is None else residual + y
    if _needs_grad(*tensors):
        if residual is x:  # torch.compile takes no tensor twice in one Function
            return residual + _Mlp.apply(*tensors[:5], None)[0]
        return _Mlp.apply(*tensors)[0]
    return torch.ops.xattn_ops.onednn_mlp_fwd(*tensors, False)[0]


def _check_shapes(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} is {list(weight.shape)}; for an input {list(x.shape)} it must be [N, K] "
            "with K the input's last size"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name.replace('weight', 'bias')} is {list(bias.shape)}; for a weight "
            f"{list(weight.shape)} it must be {list(weight.shape[:1])}"
        )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.xattn_ops.onednn_linear_fwd(x, weight, bias, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need = list(ctx.needs_input_grad)
        grads = torch.ops.xattn_ops.onednn_linear_bwd(grad, x, weight, need)
        return tuple(g if n else None for g, n in zip(grads, need, strict=True))


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keep = x.numel() // x.shape[-1] * w1.shape[0] <= KEEP_ELEMENTS
        return torch.ops.xattn_ops.onednn_mlp_fwd(x, w1, b1, w2, b2, residual, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w1, b1, w2 = inputs[:4]
        ctx.save_for_backward(x, w1, b1, w2, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        need = list(ctx.needs_input_grad)
        grads = torch.ops.xattn_ops.onednn_mlp_bwd(grad, *ctx.saved_tensors, need[:5])
        grads = (*grads, grad)  # the residual's gradient is grad itself
        return tuple(g if n else None for g, n in zip(grads, need, strict=True))


# ---- The leaf operators: no autograd; CPU tensors, float32 or (forward) bfloat16 ---------------

_library = torch.library.Library("xattn_ops", "FRAGMENT")
_library.define("onednn_linear_fwd(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
_library.define(
    "onednn_linear_bwd(Tensor grad, Tensor x, Tensor weight, bool[] need)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "onednn_mlp_fwd(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? residual,"
    " bool keep) -> (Tensor, Tensor)"
)
_library.define(
    "onednn_mlp_bwd(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor hidden,"
    " bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x [M, K] times weight [N, K] transposed. Either may itself be the transpose of a matrix."""
    return torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, "gelu" if gelu else "none", [], "none"
    )


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """grad [M, N], x [M, K] -> grad^T x [N, K], contiguous.

    oneDNN sums over long columns best with the narrower matrix first; square weights go best as a
    1x1 convolution's gradient.
    """
    (m, n), k = grad.shape, x.shape[1]
    if m == 0:
        return grad.new_zeros(n, k)
    if n == k and m > n:
        pixels = [t.view(1, 1, m, n).permute(0, 3, 1, 2) for t in (grad, x)]
        options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        weight = grad.new_empty(n, k, 1, 1)
        return torch.ops.aten.convolution_backward(*pixels, weight, None, *options)[1].view(n, k)
    if n > k and m > n:
        return _matmul(x.t(), grad.t()).t().contiguous()
    return _matmul(grad.t(), x.t())


def _rows(t: Tensor) -> Tensor:
    """[..., C] -> contiguous [M, C]."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def _linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y = _matmul(_rows(x), weight.contiguous(), bias, gelu)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_bwd(grad: Tensor, x: Tensor, weight: Tensor, need: list[bool]) -> tuple[Tensor, ...]:
    rows, none = _rows(grad), grad.new_empty(0)
    return (
        _matmul(rows, weight.contiguous().t()).view(x.shape) if need[0] else none,
        _weight_grad(rows, _rows(x)) if need[1] else none.clone(),
        rows.sum(0) if need[2] else none.clone(),
    )


def _chunks(rows: int, hidden: int) -> list[slice]:
    """Row ranges of nearly one size: in cache, yet long enough to pay for reading the weights."""
    size = max(CHUNK_ELEMENTS * torch.get_num_threads() // hidden, hidden)
    count = max(1, rows // size)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, residual: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    rows, out_shape = _rows(x), (*x.shape[:-1], w2.shape[0])
    w1, b1, w2, b2 = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    shortcut = None if residual is None else _rows(residual)
    if keep:
        kept = _matmul(rows, w1, b1)
        y = _matmul(F.gelu(kept), w2, b2)
        return (y if shortcut is None else y.add_(shortcut)).view(out_shape), kept
    out = x.new_empty(rows.shape[0], w2.shape[0])
    for part in _chunks(rows.shape[0], w1.shape[0]):
        y = _matmul(_matmul(rows[part], w1, b1, gelu=True), w2, b2)
        if shortcut is None:
            out[part] = y
        else:
            torch.add(shortcut[part], y, out=out[part])
    return out.view(out_shape), x.new_empty(0, w1.shape[0])


def _mlp_bwd(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, kept: Tensor, need: list[bool]
) -> tuple[Tensor, ...]:
    dy, rows, hidden = _rows(grad), _rows(x), w1.shape[0]
    w1, b1, w2 = w1.contiguous(), b1.contiguous(), w2.contiguous()
    dx = torch.empty_like(rows) if need[0] else x.new_empty(0)
    # Partial sums over the chunks, added in their order: the result does not vary between runs.
    dw1, db1, dw2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
    for part in _chunks(rows.shape[0], hidden):
        pre = kept[part] if kept.shape[0] else _matmul(rows[part], w1, b1)
        if need[3]:
            dw2 += _weight_grad(dy[part], F.gelu(pre))
        dpre = _matmul(dy[part], w2.t())
        torch.ops.aten.gelu_backward.grad_input(dpre, pre, grad_input=dpre)
        if need[0]:
            dx[part] = _matmul(dpre, w1.t())
        if need[1]:
            dw1 += _weight_grad(dpre, rows[part])
        if need[2]:
            db1 += dpre.sum(0)
    return dx.view(x.shape if need[0] else 0), dw1, db1, dw2, dy.sum(0)


for _name, _kernel in {
    "onednn_linear_fwd": _linear_fwd,
    "onednn_linear_bwd": _linear_bwd,
    "onednn_mlp_fwd": _mlp_fwd,
    "onednn_mlp_bwd": _mlp_bwd,
}.items():
    _library.impl(_name, _kernel, "CPU")


@torch.library.register_fake("xattn_ops::onednn_linear_fwd", lib=_library)
def _(x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("xattn_ops::onednn_linear_bwd", lib=_library)
def _(grad, x, weight, need):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(grad.new_empty(s if n else 0) for s, n in zip(shapes, need, strict=True))


@torch.library.register_fake("xattn_ops::onednn_mlp_fwd", lib=_library)
def _(x, w1, b1, w2, b2, residual, keep):
    rows = x.numel() // x.shape[-1]
    out = x.new_empty(*x.shape[:-1], w2.shape[0])
    return out, x.new_empty(rows if keep else 0, w1.shape[0])


@torch.library.register_fake("xattn_ops::onednn_mlp_bwd", lib=_library)
def _(grad, x, w1, b1, w2, kept, need):
    shapes = x.shape if need[0] else 0, w1.shape, b1.shape, w2.shape, w2.shape[:1]
    return tuple(grad.new_empty(shape) for shape in shapes)


@register_flop_formula(torch.ops.xattn_ops.onednn_linear_fwd)
def _(x_shape, w_shape, *args, **kwargs):
    return 2 * _product(x_shape) * w_shape[0]


@register_flop_formula(torch.ops.xattn_ops.onednn_linear_bwd)
def _(grad_shape, x_shape, w_shape, need, *args, **kwargs):
    return 2 * _product(x_shape) * w_shape[0] * (need[0] + need[1])


@register_flop_formula(torch.ops.xattn_ops.onednn_mlp_fwd)
def _(x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs):
    return 2 * _product(x_shape[:-1]) * w1_shape[0] * (w1_shape[1] + w2_shape[0])


@register_flop_formula(torch.ops.xattn_ops.onednn_mlp_bwd)
def _(grad_shape, x_shape, w1_shape, b1_shape, w2_shape, kept_shape, need, *args, **kwargs):
    # Each of the four products counts when its result is asked for; recomputation does not.
    first, second = need[0] + need[1], 1 + need[3]
    return 2 * _product(x_shape[:-1]) * w1_shape[0] * (first * w1_shape[1] + second * w2_shape[0])


def _product(shape: Any) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
