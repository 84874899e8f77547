"""Cross-patch self-attention: the public function and its gradient."""

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
from .reference import cross_patch_attention_reference


def cross_patch_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch: tuple[int, int] = (7, 7),
    num_heads: int = 1,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention of the patches inside every single channel of a map.

    y = softmax(scale * q k^T) v W_p^T + b_p with (q, k, v) = t W^T + b, where the tokens t of one
    image and channel are its patches (CAT, Lin et al. 2021, 3.1.2, eq. 3). Patches are read and
    written in place, and the projections are part of the operator.

    Args:
        x: [B, H, W, C]; float32, bfloat16, float16 or float64. H and W of any size are filled up
            to whole patches with zeros below and right; these take part and are cropped. Under
            autocast all tensors take its dtype.
        qkv_weight: [3P, P] for patches of P = h * w pixels, read row by row; its rows are laid out
            (3, num_heads, P / num_heads).
        qkv_bias: [3P] or None.
        proj_weight: [P, P].
        proj_bias: [P] or None.
        patch: rows h and columns w of a patch.
        num_heads: divides P.
        scale: factor on the logits; None: (P / num_heads) ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; `torch.manual_seed`
            reproduces the mask, which is the same on every backend.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, H, W, C], contiguous. Gradients reach x, both weights and both biases; once, unless
        the backend is the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    x, qkv_weight, qkv_bias, proj_weight, proj_bias = autocast(
        x, qkv_weight, qkv_bias, proj_weight, proj_bias
    )
    tensors = (x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    wanted = (patch, num_heads, scale, dropout_p, backend)
    chosen, (ph, pw, num_heads, scale, dropout_p) = _checks.once(_plan, tensors, wanted)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    if chosen == "reference":
        return cross_patch_attention_reference(
            x,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            patch=(ph, pw),
            num_heads=num_heads,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
    return apply(
        _CrossPatchAttention,
        x,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        seed,
        kernels(chosen),
        (ph, pw, num_heads, scale, dropout_p),
    )


class _CrossPatchAttention(torch.autograd.Function):
    """The leaf ops as one differentiable function of (x, its four weights, seed)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        seed: Tensor | None,
        ops: Any,
        options: tuple[Any, ...],
    ) -> Tensor:
        return ops.cpsa_fwd(x, qkv_weight, qkv_bias, proj_weight, proj_bias, seed, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        args = (grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.cpsa_bwd, *args)
        return asked_for(ctx, grads)


def _plan(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    patch: tuple[int, int],
    num_heads: int,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[str, tuple[Any, ...]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    _checks.tensor("x", x, "[B, H, W, C]")
    ph, pw = _checks.pair("patch", patch, 1)
    P = ph * pw
    head_dim = _checks.divides("num_heads", num_heads, "the pixels of a patch", P)
    like = ("x", x)
    _checks.tensor("qkv_weight", qkv_weight, "[3P, P]", sizes=(3 * P, P), like=like)
    if qkv_bias is not None:
        _checks.tensor("qkv_bias", qkv_bias, "[3P]", sizes=(3 * P,), like=like)
    _checks.tensor("proj_weight", proj_weight, "[P, P]", sizes=(P, P), like=like)
    if proj_bias is not None:
        _checks.tensor("proj_bias", proj_bias, "[P]", sizes=(P,), like=like)
    scale = _checks.scale(scale, head_dim)
    dropout_p = _checks.probability("dropout_p", dropout_p)
    chosen = choose("cross_patch_attention", backend, x.device.type, x.dtype)
    return chosen, (ph, pw, num_heads, scale, dropout_p)


def _forward_flops(x: tuple[int, ...], *args: Any) -> int:
    projection, product = _macs(x, *args[5:7])
    return 2 * (4 * projection + 2 * product)


def _backward_flops(grad_out: tuple[int, ...], x: tuple[int, ...], *args: Any) -> int:
    """The forward again, less its last projection, then two products for each of the forward's.

    As torch counts the backward of SDPA, what is computed again counts.
    """
    projection, product = _macs(x, *args[5:7])
    return 2 * ((3 + 8) * projection + (2 + 4) * product)


def _macs(x: tuple[int, ...], ph: int, pw: int) -> tuple[int, int]:
    """Multiply-adds of a P x P projection of all tokens, and of q k^T (or its product with v)."""
    B, H, W, C = x
    T, P = -(-H // ph) * -(-W // pw), ph * pw
    return B * C * T * P * P, B * C * T * T * P


serve(
    "cross_patch_attention",
    cuda=cuda("cpsa_fwd", "cpsa_bwd"),
    cpu=lambda call: missing("cpsa_fwd", "cpsa_bwd"),
    triton=triton("xattn_ops.cpsa.triton_backward"),
)
register(
    "cpsa_fwd",
    batched=("x",),
    fake=lambda x, *_: x.new_empty(x.shape),
    flops=_forward_flops,
)
register(
    "cpsa_bwd",
    batched=("grad_out", "x"),
    returns_batched=(True, False, False, False, False),
    fake=lambda grad_out, *inputs: tuple(
        grad_out.new_empty(0 if t is None else t.shape) for t in inputs[:5]
    ),
    flops=_backward_flops,
)
