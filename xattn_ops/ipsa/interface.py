"""Inner-patch self-attention: the public function and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._backend import choose, cuda, kernels, serve, triton
from .._dropout import draw_seed
from .._registration import (
    apply,
    asked_for,
    autocast,
    backward_once,
    missing,
    register,
)
from .reference import inner_patch_attention_reference


def inner_patch_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window: tuple[int, int] = (7, 7),
    shift: tuple[int, int] = (0, 0),
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention of the pixels inside every window of a map.

    out = softmax(scale * q k^T + bias) v in each window and head (CAT, Lin et al. 2021, 3.1.1,
    eq. 2; the relative bias is Swin's, Liu et al. 2021, eq. 4). Windows, shift, padding and bias
    are read in place: no copy of the map, no dense bias, no matrix of weights is ever stored.

    Args:
        qkv: [B, H, W, 3C], laid out (3, num_heads, D); any H and W; float32, bfloat16, float16 or
            float64. Under autocast all tensors take its dtype.
        bias_table: [(2h-1)(2w-1), num_heads] for windows (h, w); the row for query minus key
            (dy, dx) is (dy+h-1)(2w-1) + dx+w-1. None: no bias.
        num_heads: divides C.
        window: rows and columns of a window.
        shift: the padded map is rolled by -shift, each entry smaller than the window's. Tokens
            attend within the region they came from (Swin's mask), on a map of any size.
        pad_qkv: [3C], q, k and v of the tokens that fill the last windows below and right of the
            image. They take part and are cropped. Usually the bias of the qkv layer. None: zeros.
        scale: factor on the logits; None: D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; `torch.manual_seed`
            reproduces the mask, which is the same on every backend.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, H, W, C], contiguous. Gradients reach qkv, bias_table and pad_qkv; once, unless the
        backend is the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    qkv, bias_table, pad_qkv = autocast(qkv, bias_table, pad_qkv)
    tensors = (qkv, bias_table, pad_qkv)
    wanted = (num_heads, window, shift, scale, dropout_p, backend)
    chosen, options = _checks.once(_plan, tensors, wanted)
    num_heads, wh, ww, sh, sw, scale, dropout_p = options
    seed = draw_seed(qkv.device) if dropout_p > 0 else None
    if chosen == "reference":
        return inner_patch_attention_reference(
            qkv,
            bias_table,
            num_heads=num_heads,
            window=(wh, ww),
            shift=(sh, sw),
            pad_qkv=pad_qkv,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
    return apply(_InnerPatchAttention, qkv, bias_table, pad_qkv, seed, kernels(chosen), options)


class _InnerPatchAttention(torch.autograd.Function):
    """The leaf ops as one differentiable function of (qkv, bias_table, pad_qkv, seed)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        qkv: Tensor,
        bias_table: Tensor | None,
        pad_qkv: Tensor | None,
        seed: Tensor | None,
        ops: Any,
        options: tuple[Any, ...],
    ) -> Tensor:
        return ops.ipsa_fwd(qkv, bias_table, pad_qkv, seed, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        args = (grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.ipsa_bwd, *args)
        return asked_for(ctx, grads)


def _plan(
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[str, tuple[Any, ...]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    _checks.tensor("qkv", qkv, "[B, H, W, 3C]")
    head_dim = _checks.head_dim("qkv", qkv, 3, num_heads)
    wh, ww = _checks.pair("window", window, 1)
    sh, sw = _checks.shift(shift, (wh, ww))
    if bias_table is not None:
        sizes = ((2 * wh - 1) * (2 * ww - 1), num_heads)
        layout = "[(2h-1)(2w-1), num_heads]"
        _checks.tensor("bias_table", bias_table, layout, sizes=sizes, like=("qkv", qkv))
    if pad_qkv is not None:
        _checks.tensor("pad_qkv", pad_qkv, "[3C]", sizes=qkv.shape[-1:], like=("qkv", qkv))
    scale = _checks.scale(scale, head_dim)
    dropout_p = _checks.probability("dropout_p", dropout_p)
    chosen = choose("inner_patch_attention", backend, qkv.device.type, qkv.dtype)
    return chosen, (num_heads, wh, ww, sh, sw, scale, dropout_p)


def _macs(qkv: tuple[int, ...], wh: int, ww: int) -> int:
    """Multiply-adds of q k^T on the padded map; the product with v has as many."""
    B, H, W, C3 = qkv
    return B * -(-H // wh) * -(-W // ww) * (wh * ww) ** 2 * (C3 // 3)


serve(
    "inner_patch_attention",
    cuda=cuda("ipsa_fwd", "ipsa_bwd"),
    cpu=lambda call: missing("ipsa_fwd", "ipsa_bwd"),
    triton=triton("xattn_ops.ipsa.triton_backward"),
)
register(
    "ipsa_fwd",
    batched=("qkv",),
    fake=lambda qkv, *_: qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3),
    flops=lambda qkv, table, pad, seed, heads, wh, ww, *_: 2 * 2 * _macs(qkv, wh, ww),
)
register(
    "ipsa_bwd",
    batched=("grad_out", "qkv"),
    returns_batched=(True, False, False),
    fake=lambda grad, qkv, table, pad, *_: tuple(
        qkv.new_empty(0 if t is None else t.shape) for t in (qkv, table, pad)
    ),
    # the scores again and four products, as torch counts the backward of SDPA
    flops=lambda grad, qkv, table, pad, seed, heads, wh, ww, *_: 2 * 5 * _macs(qkv, wh, ww),
)
