"""Token merge and enhancement: the public function and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._backend import choose, cuda, kernels, serve, triton
from .._registration import apply, asked_for, autocast, backward_once, missing, register
from .merge_reference import token_merge_enhance_reference


def token_merge_enhance(
    x: Tensor,
    merge_weight: Tensor | None,
    enhance_weight: Tensor,
    enhance_bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    stride: int = 4,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The digests of an image's tokens and the tokens enhanced: two depthwise convolutions.

    digests = DWConv_merge(x), k x k with a stride; enhanced = [prefix tokens; DWConv_enhance(x) +
    bias] (TME; CabViT, Zhang et al., 3.1, Fig. 3). One pass over the tokens serves both, in the
    layout of the tokens: no transpose to an image and back.

    Args:
        x: [B, N, C]; N = num_prefix_tokens + gh * gw, the prefix first, then the grid row by row;
            float32, bfloat16, float16 or float64. Under autocast all tensors take its dtype.
        merge_weight: [C, 1, k, k] with odd k; windows stand `stride` apart, the first around the
            first token of the grid (padding k // 2). None: no digests.
        enhance_weight: [C, 1, k, k] with odd k of its own, stride 1. In both, zeros stand beyond
            the grid's edges.
        enhance_bias: [C] or None.
        grid: (gh, gw), rows and columns of the tokens.
        stride: of the merge, in both directions.
        num_prefix_tokens: how many tokens, such as a class token, precede the grid; they pass
            unchanged into `enhanced` and take no part in the digests.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can (see `explain`).

    Returns:
        (digests [B, ceil(gh / stride) * ceil(gw / stride), C], enhanced [B, N, C]), contiguous;
        digests is None without merge_weight. Gradients reach all four tensors; once, unless the
        backend is the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or a
            named backend that cannot serve.
    """
    tensors = autocast(x, merge_weight, enhance_weight, enhance_bias)
    wanted = (grid, stride, num_prefix_tokens, backend)
    chosen, options = _checks.once(_plan, tensors, wanted)
    if chosen == "reference":
        rows, columns, stride, num_prefix_tokens = options
        return token_merge_enhance_reference(
            *tensors, grid=(rows, columns), stride=stride, num_prefix_tokens=num_prefix_tokens
        )
    digests, enhanced = apply(_TokenMergeEnhance, *tensors, kernels(chosen), options)
    return (None if merge_weight is None else digests), enhanced


class _TokenMergeEnhance(torch.autograd.Function):
    """The leaf ops as one differentiable function of (x, merge weight, enhance weight, bias).

    Without a merge weight the first output is empty. An output that nobody used has no gradient,
    and its convolution is left out of the backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        merge_weight: Tensor | None,
        enhance_weight: Tensor,
        enhance_bias: Tensor | None,
        ops: Any,
        options: tuple[int, int, int, int],
    ) -> tuple[Tensor, Tensor]:
        return ops.merge_fwd(x, merge_weight, enhance_weight, enhance_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ops, ctx.options = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grad_out):
            return (None,) * 6
        args = (*grad_out, *ctx.saved_tensors, *ctx.options)
        grads = backward_once(ctx.ops.merge_bwd, *args)
        return asked_for(ctx, grads)


def _plan(
    x: Tensor,
    merge_weight: Tensor | None,
    enhance_weight: Tensor,
    enhance_bias: Tensor | None,
    grid: tuple[int, int],
    stride: int,
    num_prefix_tokens: int,
    backend: str | None,
) -> tuple[str, tuple[int, int, int, int]]:
    """The backend and the leaf ops' options for arguments that pass every check."""
    _checks.tensor("x", x, "[B, N, C]")
    rows, columns = _checks.token_grid("x", x, grid, num_prefix_tokens)
    channels, like, layout = x.shape[-1], ("x", x), "[C, 1, k, k]"
    if merge_weight is not None:
        _checks.depthwise("merge_weight", merge_weight, layout, like=like, channels=channels)
    _checks.depthwise("enhance_weight", enhance_weight, layout, like=like, channels=channels)
    if enhance_bias is not None:
        _checks.tensor("enhance_bias", enhance_bias, "[C]", sizes=(channels,), like=like)
    _checks.integer("stride", stride, 1)
    chosen = choose("token_merge_enhance", backend, x.device.type, x.dtype)
    return chosen, (rows, columns, stride, num_prefix_tokens)


def _num_digests(merge_weight: Any, rows: int, columns: int, stride: int) -> int:
    """m, 0 without a merge."""
    return 0 if merge_weight is None else -(-rows // stride) * -(-columns // stride)


def _fake_forward(x: Tensor, merge_weight: Any, *args: Any) -> tuple[Tensor, Tensor]:
    B, _, C = x.shape
    return x.new_empty(B, _num_digests(merge_weight, *args[2:5]), C), x.new_empty(x.shape)


def _macs(x: Any, merge: Any, enhance: Any, options: tuple[int, ...]) -> tuple[int, int]:
    """Multiply-adds of the two convolutions; merge, enhance: shapes of the weights."""
    B, C, (rows, columns) = x[0], x[2], options[:2]
    digests = _num_digests(merge, *options[:3])
    merged = B * digests * C * merge[-1] ** 2 if merge else 0
    return merged, B * rows * columns * C * enhance[-1] ** 2


def _forward_flops(x: Any, merge: Any, enhance: Any, bias: Any, *options: Any) -> int:
    return 2 * sum(_macs(x, merge, enhance, options))


def _backward_flops(
    grad_digests: Any,
    grad_enhanced: Any,
    x: Any,
    merge: Any,
    enhance: Any,
    bias: Any,
    *options: Any,
) -> int:
    """To the input and to the weight, of each convolution whose output has a gradient."""
    merged, enhanced = _macs(x, merge, enhance, options)
    return 2 * 2 * (merged * (grad_digests is not None) + enhanced * (grad_enhanced is not None))


serve(
    "token_merge_enhance",
    cuda=cuda("merge_fwd", "merge_bwd"),
    cpu=lambda call: missing("merge_fwd", "merge_bwd"),
    triton=triton("xattn_ops.digest.triton_merge"),
)
register(
    "merge_fwd",
    batched=("x",),
    returns_batched=(True, True),
    fake=_fake_forward,
    flops=_forward_flops,
)
register(
    "merge_bwd",
    batched=("grad_digests", "grad_enhanced", "x"),
    returns_batched=(True, False, False, False),
    fake=lambda grad_digests, grad_enhanced, x, *weights: tuple(
        x.new_empty(0 if t is None else t.shape) for t in (x, *weights[:3])
    ),
    flops=_backward_flops,
)
