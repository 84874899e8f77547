"""Digest-token attention: the public function and its gradient."""

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
from .reference import digest_attention_reference


def digest_attention(
    qkv: Tensor,
    digest_kv: Tensor | None = None,
    bias_table: Tensor | None = None,
    digest_bias: Tensor | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of an image's tokens over themselves and the digest tokens of earlier blocks.

    out = softmax(scale * q [k, dk]^T + bias) [v, dv] in each head (CabViT, Zhang et al., 3.1, eq.
    1-4). Tokens and digests are read where they lie: they are not concatenated, the bias is
    looked up, no matrix of weights is ever stored.

    Args:
        qkv: [B, N, 3C], laid out (3, num_heads, D); N = num_prefix_tokens + gh * gw, the prefix
            first, then the grid row by row; float32, bfloat16, float16 or float64. Under autocast
            all tensors take its dtype.
        digest_kv: [B, M, 2C], keys and values of the digests, laid out (2, num_heads, D); any M,
            also 0; a slice of a longer buffer is read in place. None: no digests.
        bias_table: [num_heads, gh * gw]; what a query adds to a key dy rows and dx columns away is
            in column |dy| * gw + |dx|. Prefix tokens have no relative bias, neither as queries nor
            as keys. None: no bias.
        digest_bias: [num_heads, M], added to the logits of each digest. None: no bias.
        num_heads: divides C.
        grid: (gh, gw), rows and columns of the tokens.
        num_prefix_tokens: how many tokens, such as a class token, precede the grid.
        scale: factor on the logits; None: D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; `torch.manual_seed`
            reproduces the mask, which is the same on every backend.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, N, C], contiguous. Gradients reach all four tensors; once, unless the backend is the
        reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    tensors = autocast(qkv, digest_kv, bias_table, digest_bias)
    wanted = (num_heads, grid, num_prefix_tokens, scale, dropout_p, backend)
    chosen, options = _checks.once(_plan, tensors, wanted)
    num_heads, gh, gw, num_prefix_tokens, scale, dropout_p = options
    seed = draw_seed(tensors[0].device) if dropout_p > 0 else None
    if chosen == "reference":
        return digest_attention_reference(
            *tensors,
            num_heads=num_heads,
            grid=(gh, gw),
            num_prefix_tokens=num_prefix_tokens,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
        )
    return apply(_DigestAttention, *tensors, seed, kernels(chosen), options)[0]


class _DigestAttention(torch.autograd.Function):
    """The leaf ops as one differentiable function of (qkv, digest_kv, two biases, seed).

    Returns the output and the statistics of the softmax rows; only the first is differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        qkv: Tensor,
        digest_kv: Tensor | None,
        bias_table: Tensor | None,
        digest_bias: Tensor | None,
        seed: Tensor | None,
        ops: Any,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        return ops.digest_fwd(qkv, digest_kv, bias_table, digest_bias, seed, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, seed, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[1], seed)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 7
        args = (grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.digest_bwd, *args)
        return asked_for(ctx, grads)


def _plan(
    qkv: Tensor,
    digest_kv: Tensor | None,
    bias_table: Tensor | None,
    digest_bias: Tensor | None,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[str, tuple[Any, ...]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    tensors = (qkv, digest_kv, bias_table, digest_bias)
    gh, gw, prefix, scale = check(*tensors, num_heads, grid, num_prefix_tokens, scale)
    dropout_p = _checks.probability("dropout_p", dropout_p)
    chosen = choose("digest_attention", backend, qkv.device.type, qkv.dtype)
    return chosen, (num_heads, gh, gw, prefix, scale, dropout_p)


def check(
    qkv: Tensor,
    digest_kv: Tensor | None,
    bias_table: Tensor | None,
    digest_bias: Tensor | None,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
) -> tuple[int, int, int, float]:
    """Rows, columns, number of prefix tokens and scale of arguments that pass every check."""
    _checks.tensor("qkv", qkv, "[B, N, 3C]")
    B, _, C3 = qkv.shape
    head_dim = _checks.head_dim("qkv", qkv, 3, num_heads)
    gh, gw = _checks.token_grid("qkv", qkv, grid, num_prefix_tokens)
    like = ("qkv", qkv)
    M = 0
    if digest_kv is not None:
        _checks.tensor("digest_kv", digest_kv, "[B, M, 2C]", like=like)
        M = digest_kv.shape[1]
        kv_sizes = (B, M, C3 // 3 * 2)
        _checks.tensor("digest_kv", digest_kv, "[B, M, 2C]", sizes=kv_sizes, like=like)
    if bias_table is not None:
        sizes, layout = (num_heads, gh * gw), "[num_heads, gh * gw]"
        _checks.tensor("bias_table", bias_table, layout, sizes=sizes, like=like)
    if digest_bias is not None:
        sizes, layout = (num_heads, M), "[num_heads, M]"
        _checks.tensor("digest_bias", digest_bias, layout, sizes=sizes, like=like)
    return gh, gw, num_prefix_tokens, _checks.scale(scale, head_dim)


def _macs(qkv: tuple[int, ...], digest_kv: tuple[int, ...] | None) -> int:
    """Multiply-adds of q k^T; the product with v has as many."""
    B, N, C3 = qkv
    return B * N * (N + (digest_kv[1] if digest_kv else 0)) * (C3 // 3)


def _fake_forward(qkv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    B, N, C3 = qkv.shape
    num_heads = args[4]
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    stats = qkv.new_empty(B, num_heads, N, 2, dtype=compute)
    return qkv.new_empty(B, N, C3 // 3), stats


serve(
    "digest_attention",
    cuda=cuda("digest_fwd", "digest_bwd"),
    cpu=lambda call: missing("digest_fwd", "digest_bwd"),
    triton=triton("xattn_ops.digest.triton_backward"),
)
register(
    "digest_fwd",
    batched=("qkv", "digest_kv"),
    returns_batched=(True, True),
    fake=_fake_forward,
    flops=lambda qkv, digest_kv, *_: 2 * 2 * _macs(qkv, digest_kv),
)
register(
    "digest_bwd",
    batched=("grad_out", "qkv", "digest_kv", "row_stats"),
    returns_batched=(True, True, False, False),
    fake=lambda grad, *tensors: tuple(
        grad.new_empty(0 if t is None else t.shape) for t in tensors[:4]
    ),
    # the scores again and four products, as torch counts the backward of SDPA
    flops=lambda grad, qkv, digest_kv, *_: 2 * 5 * _macs(qkv, digest_kv),
    wide=("row_stats",),
)
