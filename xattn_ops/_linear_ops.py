"""Linear layers by oneDNN, and MLPs chunk by chunk, as leaf operators of torch.ops.xattn_ops.

They have no autograd formula (`_linear` has). CPU tensors of float32, in the forward also of
bfloat16. `onednn`: whether oneDNN multiplies the matrices, or what PyTorch takes for `addmm`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Rows of `mlp` go through in chunks whose hidden activations are this many elements a thread, and
# no more than that: they stay in cache, and no buffer grows to the size from which malloc maps it
# afresh on every call (32 MiB in glibc).
CHUNK_ELEMENTS = 1 << 19
LARGEST_CHUNK = 1 << 22

_library = torch.library.Library("xattn_ops", "FRAGMENT")
_library.define("onednn_linear_fwd(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
_library.define(
    "onednn_linear_bwd(Tensor grad, Tensor x, Tensor weight, bool[] need)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "mlp_fwd(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? residual,"
    " bool keep, bool onednn) -> (Tensor, Tensor)"
)
_library.define(
    "mlp_bwd(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor hidden,"
    " bool[] need, bool onednn) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False, onednn: bool = True
) -> Tensor:
    """x [M, K] times weight [N, K] transposed. Either may itself be the transpose of a matrix."""
    if onednn:
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "gelu" if gelu else "none", [], "none"
        )
    y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return torch.ops.aten.gelu_(y) if gelu else y


def _weight_grad(grad: Tensor, x: Tensor, onednn: bool = True) -> Tensor:
    """grad [M, N], x [M, K] -> grad^T x [N, K], contiguous.

    oneDNN sums over long columns best with the narrower matrix first; square weights go best as a
    1x1 convolution's gradient.
    """
    (m, n), k = grad.shape, x.shape[1]
    if m == 0:
        return grad.new_zeros(n, k)
    if not onednn:
        return torch.mm(grad.t(), x)
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
    elements = min(CHUNK_ELEMENTS * torch.get_num_threads(), LARGEST_CHUNK)
    size = max(elements // hidden, hidden)
    count = max(1, rows // size)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    keep: bool,
    onednn: bool,
) -> tuple[Tensor, Tensor]:
    matmul = functools.partial(_matmul, onednn=onednn)
    rows, out_shape = _rows(x), (*x.shape[:-1], w2.shape[0])
    w1, b1, w2, b2 = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    shortcut = None if residual is None else _rows(residual)
    if keep:
        kept = matmul(rows, w1, b1)
        y = matmul(F.gelu(kept), w2, b2)
        return (y if shortcut is None else y.add_(shortcut)).view(out_shape), kept
    out = x.new_empty(rows.shape[0], w2.shape[0])
    for part in _chunks(rows.shape[0], w1.shape[0]):
        y = matmul(matmul(rows[part], w1, b1, gelu=True), w2, b2)
        if shortcut is None:
            out[part] = y
        else:
            torch.add(shortcut[part], y, out=out[part])
    return out.view(out_shape), x.new_empty(0, w1.shape[0])


def _mlp_bwd(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    kept: Tensor,
    need: list[bool],
    onednn: bool,
) -> tuple[Tensor, ...]:
    matmul = functools.partial(_matmul, onednn=onednn)
    weight_grad = functools.partial(_weight_grad, onednn=onednn)
    dy, rows, hidden = _rows(grad), _rows(x), w1.shape[0]
    w1, b1, w2 = w1.contiguous(), b1.contiguous(), w2.contiguous()
    dx = torch.empty_like(rows) if need[0] else x.new_empty(0)
    # Partial sums over the chunks, added in their order: the result does not vary between runs.
    dw1, db1, dw2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
    for part in _chunks(rows.shape[0], hidden):
        pre = kept[part] if kept.shape[0] else matmul(rows[part], w1, b1)
        if need[3]:
            dw2 += weight_grad(dy[part], F.gelu(pre))
        dpre = matmul(dy[part], w2.t())
        torch.ops.aten.gelu_backward.grad_input(dpre, pre, grad_input=dpre)
        if need[0]:
            dx[part] = matmul(dpre, w1.t())
        if need[1]:
            dw1 += weight_grad(dpre, rows[part])
        if need[2]:
            db1 += dpre.sum(0)
    return dx.view(x.shape if need[0] else 0), dw1, db1, dw2, dy.sum(0)


for _name, _kernel in {
    "onednn_linear_fwd": _linear_fwd,
    "onednn_linear_bwd": _linear_bwd,
    "mlp_fwd": _mlp_fwd,
    "mlp_bwd": _mlp_bwd,
}.items():
    _library.impl(_name, _kernel, "CPU")


@torch.library.register_fake("xattn_ops::onednn_linear_fwd", lib=_library)
def _(x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("xattn_ops::onednn_linear_bwd", lib=_library)
def _(grad, x, weight, need):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(grad.new_empty(s if n else 0) for s, n in zip(shapes, need, strict=True))


@torch.library.register_fake("xattn_ops::mlp_fwd", lib=_library)
def _(x, w1, b1, w2, b2, residual, keep, onednn):
    rows = x.numel() // x.shape[-1]
    out = x.new_empty(*x.shape[:-1], w2.shape[0])
    return out, x.new_empty(rows if keep else 0, w1.shape[0])


@torch.library.register_fake("xattn_ops::mlp_bwd", lib=_library)
def _(grad, x, w1, b1, w2, kept, need, onednn):
    shapes = x.shape if need[0] else 0, w1.shape, b1.shape, w2.shape, w2.shape[:1]
    return tuple(grad.new_empty(shape) for shape in shapes)


@register_flop_formula(torch.ops.xattn_ops.onednn_linear_fwd)
def _(x_shape, w_shape, *args, **kwargs):
    return 2 * _product(x_shape) * w_shape[0]


@register_flop_formula(torch.ops.xattn_ops.onednn_linear_bwd)
def _(grad_shape, x_shape, w_shape, need, *args, **kwargs):
    return 2 * _product(x_shape) * w_shape[0] * (need[0] + need[1])


@register_flop_formula(torch.ops.xattn_ops.mlp_fwd)
def _(x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs):
    return 2 * _product(x_shape[:-1]) * w1_shape[0] * (w1_shape[1] + w2_shape[0])


@register_flop_formula(torch.ops.xattn_ops.mlp_bwd)
def _(grad_shape, x_shape, w1_shape, b1_shape, w2_shape, kept_shape, need, *args, **kwargs):
    # Each of the four products counts when its result is asked for; recomputation does not.
    first, second = need[0] + need[1], 1 + need[3]
    return 2 * _product(x_shape[:-1]) * w1_shape[0] * (first * w1_shape[1] + second * w2_shape[0])


def _product(shape: Any) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
