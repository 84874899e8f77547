"""CLS-query cross attention: the public function and its gradient."""

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
from .reference import cls_cross_attention_reference

K_BIAS = 5  # its place among the ten tensors


def cls_cross_attention(
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of one token, CLS, to itself and to the patches of another branch.

    out = softmax(scale * q k^T) v with q = n(cls) W_q^T + b_q and (k, v) likewise of all of
    x = [n(cls); n(patches)], where n is LayerNorm or nothing (CrossViT, Chen et al. 2021, 3.3,
    eq. 6 and 7, before the output projection). The kernels multiply W_k into the query and W_v into
    the weighted sum of the tokens: k, v, the concatenation and the normalised tokens are never
    formed, and the cost is linear in the number of tokens and of channels.

    Args:
        cls_token: [B, 1, C]; float32, bfloat16, float16 or float64. Under autocast all tensors
            take its dtype.
        patches: [B, N, C], at least one.
        q_weight, k_weight, v_weight: [C, C]; rows are laid out (num_heads, D).
        q_bias, k_bias, v_bias: [C] or None. k_bias adds the same to all logits of a head: it
            changes nothing, and its gradient is zero.
        num_heads: divides C.
        norm_weight: [C], of a LayerNorm over all tokens; None: none.
        norm_bias: [C] or None; only with norm_weight.
        eps: of the LayerNorm.
        scale: factor on the logits; None: D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; `torch.manual_seed`
            reproduces the mask, which is the same on every backend.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, 1, C], contiguous. Gradients reach both activations and every weight and bias; once,
        unless the backend is the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    tensors = autocast(
        cls_token,
        patches,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        norm_weight,
        norm_bias,
    )
    wanted = (num_heads, eps, scale, dropout_p, backend)
    chosen, options = _checks.once(_plan, tensors, wanted)
    seed = draw_seed(cls_token.device) if options[-1] > 0 else None
    if chosen == "reference":
        num_heads, eps, scale, dropout_p = options
        return cls_cross_attention_reference(
            *tensors[:8],
            num_heads=num_heads,
            norm_weight=tensors[8],
            norm_bias=tensors[9],
            eps=eps,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
    return apply(_ClsCrossAttention, *tensors, seed, kernels(chosen), options)[0]


class _ClsCrossAttention(torch.autograd.Function):
    """The leaf ops as one differentiable function of (the ten tensors, seed).

    The outputs but the first are what backward needs of each head and of each token; nobody
    differentiates them. The leaf ops do without k_bias.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cls_token: Tensor,
        patches: Tensor,
        q_weight: Tensor,
        q_bias: Tensor | None,
        k_weight: Tensor,
        k_bias: Tensor | None,
        v_weight: Tensor,
        v_bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        seed: Tensor | None,
        ops: Any,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.clsattn_fwd(
            cls_token,
            patches,
            q_weight,
            q_bias,
            k_weight,
            v_weight,
            v_bias,
            norm_weight,
            norm_bias,
            seed,
            *options,
        )

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        *tensors, seed, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output[1:], seed)
        ctx.set_materialize_grads(False)  # or zeros would be made for the other outputs

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 13
        saved = list(ctx.saved_tensors)
        k_bias = saved.pop(K_BIAS)
        grads = list(backward_once(ctx.ops.clsattn_bwd, grad_out, *saved, *ctx.options))
        grads.insert(K_BIAS, None if k_bias is None else torch.zeros_like(k_bias))
        return asked_for(ctx, grads)


def _plan(cls_token: Tensor, *arguments: Any) -> tuple[str, tuple[int, float, float, float]]:
    """The backend and the leaf ops' options for arguments that pass every check.

    arguments: the others of `check`, then dropout_p and backend.
    """
    *checked, dropout_p, backend = arguments
    num_heads, (scale, eps) = checked[-3], check(cls_token, *checked)
    dropout_p = _checks.probability("dropout_p", dropout_p)
    chosen = choose("cls_cross_attention", backend, cls_token.device.type, cls_token.dtype)
    return chosen, (num_heads, eps, scale, dropout_p)


def check(
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_heads: int,
    eps: float,
    scale: float | None,
    *,
    values: bool = True,
) -> tuple[float, float]:
    """scale and eps, once every argument is right; values: whether there have to be v's."""
    _checks.tensor("cls_token", cls_token, "[B, 1, C]")
    B, one, C = cls_token.shape
    if one != 1:
        raise ValueError(f"cls_token must be [B, 1, C], got shape {list(cls_token.shape)}")
    like = ("cls_token", cls_token)
    _checks.tensor("patches", patches, "[B, N, C]", like=like)
    if patches.shape[0] != B or patches.shape[1] < 1 or patches.shape[2] != C:
        raise ValueError(
            f"patches must be [B, N, C] with B = {B}, N at least 1 and C = {C}, "
            f"got shape {list(patches.shape)}"
        )
    head_dim = _checks.divides("num_heads", num_heads, "the channels of cls_token", C)
    weights = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    for name, weight in weights.items():
        if values or name != "v_weight":
            _checks.tensor(name, weight, "[C, C]", sizes=(C, C), like=like)
    for name, bias in (biases | {"norm_weight": norm_weight, "norm_bias": norm_bias}).items():
        if bias is not None:
            _checks.tensor(name, bias, "[C]", sizes=(C,), like=like)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias must be None where norm_weight is None, got a tensor")
    return _checks.scale(scale, head_dim), _checks.nonnegative("eps", eps)


def _fake(cls_token: Tensor, patches: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (B, _, C), norm_weight, num_heads = cls_token.shape, args[5], args[8]
    wide = torch.promote_types(cls_token.dtype, torch.float32)
    rows = num_heads if norm_weight is None else num_heads + 2
    return (
        cls_token.new_empty(B, 1, C),
        cls_token.new_empty(B, num_heads, C // num_heads + 2 * C, dtype=wide),
        cls_token.new_empty(B, rows, 1 + patches.shape[1], dtype=wide),
    )


def _fake_backward(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(grad_out.new_empty(0 if t is None else t.shape) for t in inputs[:9])


def _macs(cls_token: Any, patches: Any) -> tuple[Any, Any]:
    """Multiply-adds of the projections of one token, and of q k^T (or its product with v)."""
    B, _, C = cls_token
    return B * C * C, B * (1 + patches[1]) * C


def _forward_flops(cls_token: Any, patches: Any, *_: Any) -> int:
    """The formula's: k and v of every token, though the kernels form neither."""
    projection, product = _macs(cls_token, patches)
    return 2 * ((1 + 2 * (1 + patches[1])) * projection + 2 * product)


def _backward_flops(grad_out: Any, *args: Any) -> int:
    """Two products for each of the forward's."""
    return 2 * _forward_flops(*args)


serve(
    "cls_cross_attention",
    cuda=cuda("clsattn_fwd", "clsattn_bwd"),
    cpu=lambda call: missing("clsattn_fwd", "clsattn_bwd"),
    triton=triton("xattn_ops.clsattn.triton_backward"),
)
register(
    "clsattn_fwd",
    batched=("cls_token", "patches"),
    returns_batched=(True, True, True),
    fake=_fake,
    flops=_forward_flops,
)
register(
    "clsattn_bwd",
    batched=("grad_out", "cls_token", "patches", "head_state", "token_state"),
    returns_batched=(True, True, *[False] * 7),
    fake=_fake_backward,
    flops=_backward_flops,
    wide=("head_state", "token_state"),
)
