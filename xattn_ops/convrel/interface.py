"""Conv-relative attention and the conv position encoding: public functions and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._backend import choose, cuda, kernels, serve, triton
from .._registration import (
    apply,
    asked_for,
    autocast,
    backward_once,
    missing,
    register,
)
from .reference import conv_position_encoding_reference, conv_relative_attention_reference


def conv_relative_attention(
    qkv: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor | None] | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Factorised attention with a convolutional relative position encoding.

    out = scale * q (softmax(k)^T v) + [0 for prefix tokens; q * (DWConv(v) + bias)] in each head,
    with the softmax over all tokens (CoaT, Xu et al. 2021, 4, eq. 3, 10 and 12). Linear in the
    number of tokens: qkv is read in place, what a head keeps is a D x D matrix, and neither an
    N x N map nor a copy of q, k or v is ever stored.

    Args:
        qkv: [B, N, 3C], laid out (3, num_heads, D): num_prefix_tokens tokens, then the image's row
            by row; float32, bfloat16, float16 or float64. Under autocast all tensors take its
            dtype.
        conv_weights: depthwise kernels [C_g, 1, k, k] with odd k of consecutive groups of
            channels, C in all, whatever the heads; zeros stand beyond the image's edges. Empty: no
            relative term.
        conv_biases: a list of as many [C_g], or of None throughout; None: no biases.
        num_heads: divides C.
        grid: rows and columns of the image.
        num_prefix_tokens: tokens before the image, such as CLS; they take part in the softmax.
        scale: factor on the first term; None: D ** -0.5.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, N, C], contiguous. Gradients reach qkv, every weight and every bias; once, unless the
        backend is the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    qkv, conv_weights, conv_biases = autocast(qkv, conv_weights, conv_biases)
    tensors = (qkv, conv_weights, conv_biases)
    wanted = (num_heads, grid, num_prefix_tokens, scale, backend)
    chosen, options = _checks.once(_plan_attention, tensors, wanted)
    if chosen == "reference":
        num_heads, rows, columns, num_prefix_tokens, scale = options[2:]
        return conv_relative_attention_reference(
            qkv,
            conv_weights,
            conv_biases,
            num_heads=num_heads,
            grid=(rows, columns),
            num_prefix_tokens=num_prefix_tokens,
            scale=scale,
        )
    weight, bias = _flat(qkv, conv_weights), None
    if conv_biases and conv_biases[0] is not None:
        bias = _flat(qkv, conv_biases)
    return apply(_ConvRelativeAttention, qkv, weight, bias, kernels(chosen), options)[0]


def conv_position_encoding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    num_prefix_tokens: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The image's tokens plus their depthwise convolution; prefix tokens unchanged.

    out = x + [0 for prefix tokens; DWConv(x) + bias] (CoaT, Xu et al. 2021, 4.2), in the layout of
    the tokens: no transpose to an image and back.

    Args:
        x: [B, N, C]: num_prefix_tokens tokens, then the image's row by row; float32, bfloat16,
            float16 or float64. Under autocast all tensors take its dtype.
        weight: [C, 1, k, k] with odd k; zeros stand beyond the image's edges.
        bias: [C] or None.
        grid: rows and columns of the image.
        num_prefix_tokens: tokens before the image, such as CLS.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        [B, N, C], contiguous. Gradients reach x, weight and bias; once, unless the backend is the
        reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    x, weight, bias = autocast(x, weight, bias)
    wanted = (grid, num_prefix_tokens, backend)
    chosen, options = _checks.once(_plan_encoding, (x, weight, bias), wanted)
    if chosen == "reference":
        rows, columns, num_prefix_tokens = options
        return conv_position_encoding_reference(
            x, weight, bias, grid=(rows, columns), num_prefix_tokens=num_prefix_tokens
        )
    return apply(_ConvPositionEncoding, x, weight, bias, kernels(chosen), options)


class _ConvRelativeAttention(torch.autograd.Function):
    """The leaf ops as one differentiable function of (qkv, flat weights, flat biases).

    The second output is what backward needs of the softmax; nobody differentiates it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        qkv: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        ops: Any,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        return ops.convrel_fwd(qkv, conv_weight, conv_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)  # or zeros would be made for the second output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        args = (grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.convrel_bwd, *args)
        return asked_for(ctx, grads)


class _ConvPositionEncoding(torch.autograd.Function):
    """The leaf ops as one differentiable function of (x, weight, bias)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, ops: Any, options: tuple[int, int, int]
    ) -> Tensor:
        return ops.convpos_fwd(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        args = (grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.convpos_bwd, *args)
        return asked_for(ctx, grads)


def _flat(qkv: Tensor, groups: Sequence[Any]) -> Tensor:
    """All groups' values in one row, as the leaf ops take them."""
    return torch.cat([g.flatten() for g in groups]) if groups else qkv.new_empty(0)


def _plan_attention(
    qkv: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor | None] | None,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
    backend: str | None,
) -> tuple[str, tuple[Any, ...]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    sizes = check_attention(
        qkv, conv_weights, conv_biases, num_heads, grid, num_prefix_tokens, scale
    )
    windows = [w.shape[-1] for w in conv_weights]
    channels = [w.shape[0] for w in conv_weights]
    chosen = choose("conv_relative_attention", backend, qkv.device.type, qkv.dtype)
    return chosen, (windows, channels, num_heads, *sizes)


def check_attention(
    qkv: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor | None] | None,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    scale: float | None,
) -> tuple[int, int, int, float]:
    """Rows, columns, prefix tokens and scale, once every argument is right."""
    _checks.tensor("qkv", qkv, "[B, N, 3C]")
    head_dim = _checks.head_dim("qkv", qkv, 3, num_heads)
    rows, columns = _checks.token_grid("qkv", qkv, grid, num_prefix_tokens)
    _check_convolutions(qkv, conv_weights, conv_biases)
    return rows, columns, num_prefix_tokens, _checks.scale(scale, head_dim)


def _check_convolutions(qkv: Tensor, weights: Any, biases: Any) -> None:
    """Kernels and biases of groups that make up the channels."""
    like, channels = ("qkv", qkv), qkv.shape[-1] // 3
    _checks.sequence("conv_weights", weights, "[C_g, 1, k, k]")
    for i, weight in enumerate(weights):
        _checks.depthwise(f"conv_weights[{i}]", weight, "[C_g, 1, k, k]", like=like)
    groups = [w.shape[0] for w in weights]
    if groups and sum(groups) != channels:
        raise ValueError(f"conv_weights must have C = {channels} channels in all, got {groups}")
    if biases is None:
        return
    _checks.sequence("conv_biases", biases, "[C_g]")
    if len(biases) != len(groups):
        raise ValueError(
            f"conv_biases must be as many as conv_weights, {len(groups)}, got {len(biases)}"
        )
    if all(bias is None for bias in biases):
        return
    for i, (bias, size) in enumerate(zip(biases, groups, strict=True)):
        _checks.tensor(f"conv_biases[{i}]", bias, "[C_g]", sizes=(size,), like=like)


def _plan_encoding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    backend: str | None,
) -> tuple[str, tuple[int, int, int]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    _checks.tensor("x", x, "[B, N, C]")
    rows, columns = _checks.token_grid("x", x, grid, num_prefix_tokens)
    channels = x.shape[-1]
    _checks.depthwise("weight", weight, "[C, 1, k, k]", like=("x", x), channels=channels)
    if bias is not None:
        _checks.tensor("bias", bias, "[C]", sizes=(channels,), like=("x", x))
    chosen = choose("conv_position_encoding", backend, x.device.type, x.dtype)
    return chosen, (rows, columns, num_prefix_tokens)


def _fake_attention(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Any,
    channels: Any,
    heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D, wide = C // heads, torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, N, C), qkv.new_empty(B, heads, D, D + 2, dtype=wide)


def _gradients(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Fake gradients of (activation, weight, bias)."""
    return tuple(grad_out.new_empty(0 if t is None else t.shape) for t in inputs[:3])


def _attention_macs(
    qkv: Any, windows: Any, channels: Any, heads: int, rows: int, columns: int
) -> Any:
    """Multiply-adds of k^T v over the tokens (q with it has as many), and of the convolutions."""
    B, N, C = qkv[0], qkv[1], qkv[2] // 3
    taps = sum(c * k * k for c, k in zip(channels, windows, strict=True))
    return B * N * C * (C // heads), B * rows * columns * taps


def _attention_flops(qkv: Any, weight: Any, bias: Any, *options: Any) -> int:
    product, convolution = _attention_macs(qkv, *options[:5])
    return 2 * (2 * product + convolution)


def _attention_backward_flops(
    grad_out: Any, qkv: Any, weight: Any, bias: Any, state: Any, *options: Any
) -> int:
    """Two products for each of the forward's; the convolution again, and its two gradients."""
    product, convolution = _attention_macs(qkv, *options[:5])
    return 2 * (4 * product + 3 * convolution)


def _encoding_flops(x: Any, weight: Any, bias: Any, rows: int, columns: int, *_: Any) -> int:
    return 2 * x[0] * rows * columns * weight[0] * weight[-1] ** 2


serve(
    "conv_relative_attention",
    cuda=cuda("convrel_fwd", "convrel_bwd"),
    cpu=lambda call: missing("convrel_fwd", "convrel_bwd"),
    triton=triton("xattn_ops.convrel.triton_backward"),
)
serve(
    "conv_position_encoding",
    cuda=cuda("convpos_fwd", "convpos_bwd"),
    cpu=lambda call: missing("convpos_fwd", "convpos_bwd"),
    triton=triton("xattn_ops.convrel.triton_encoding"),
)
register(
    "convrel_fwd",
    batched=("qkv",),
    returns_batched=(True, True),
    fake=_fake_attention,
    flops=_attention_flops,
)
register(
    "convrel_bwd",
    batched=("grad_out", "qkv", "state"),
    returns_batched=(True, False, False),
    fake=_gradients,
    flops=_attention_backward_flops,
    wide=("state",),
)
register(
    "convpos_fwd",
    batched=("x",),
    fake=lambda x, *_: x.new_empty(x.shape),
    flops=_encoding_flops,
)
register(
    "convpos_bwd",
    batched=("grad_out", "x"),
    returns_batched=(True, False, False),
    fake=_gradients,
    flops=lambda grad_out, *args: 2 * _encoding_flops(*args),  # to the input and to the weight
)
