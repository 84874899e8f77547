"""Linear layers and MLPs of the models: on the CPU faster than calls of F.linear and F.gelu.

- `mlp` takes rows in chunks where the hidden activations would be large, so that memory of that
  size, whose first touch costs more than the arithmetic, is never asked for; in training it then
  recomputes them. With gradients.
- In float32 PyTorch multiplies matrices with MKL, which uses half-width vectors on AMD processors
  with AVX-512; oneDNN, built into the same PyTorch, uses full ones and can finish with GELU. There
  `linear` and `mlp` take it, with gradients. In bfloat16 both libraries are the same, and oneDNN
  saves the pass for GELU where no gradient is asked for.
- On x86 processors without products of bfloat16 or float16 PyTorch computes those some ten times
  slower than float32 ones. There the layers multiply in float32 and round the result.

For other dtypes, under autocast, in function transforms, in exported programs and for tensor
subclasses they are plain `F.linear` and `F.gelu`.

The environment variable XATTN_LINEAR=onednn|torch overrides the choice; torch means plain layers.
"""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _linear_ops  # noqa: F401  (defines the leaf ops)

# Hidden activations up to this many elements stay whole, and are kept for backward. Larger ones go
# in chunks and are recomputed, which then costs less than the first touch of the memory, and saves
# it. In training with torch's own products, twice as many are kept.
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
PLAIN = os.environ.get("XATTN_LINEAR") == "torch"
PREFER_ONEDNN = _prefer_onednn()
BF16 = PREFER_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The short formats whose products this CPU lacks."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not x86 or not torch._C._has_mkldnn or os.environ.get("XATTN_LINEAR") == "torch":
        return frozenset()
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, supported in native.items() if not supported())


SLOW_DTYPES = _slow_dtypes()


def _takes_float32(*tensors: Tensor | None) -> bool:
    """Whether all are CPU tensors of one dtype whose products are slow here."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return (
        len(dtypes) == 1
        and dtypes <= SLOW_DTYPES
        and all(t is None or t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()  # a program for another machine
    )


def _in_float32(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """function of float32 copies, rounded to the dtype that came."""
    (dtype,) = {t.dtype for t in tensors if t is not None}
    return function(*(None if t is None else t.float() for t in tensors)).to(dtype)


def _takes_leaf(*tensors: Tensor | None) -> bool:
    """Whether the leaf operators take such tensors, with either library."""
    if (
        PLAIN
        or torch.compiler.is_exporting()  # exported programs hold standard operators only
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    if dtype != torch.float32 and (
        dtype != torch.bfloat16 or not BF16 or not _onednn() or _needs_grad(*present)
    ):
        return False
    return all(
        t.dtype == dtype
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and type(t) in (Tensor, torch.nn.Parameter)
        for t in present
    )


def _onednn() -> bool:
    return PREFER_ONEDNN and bool(torch.backends.mkldnn.enabled)


def _keeps(x: Tensor, hidden: int, training: bool) -> bool:
    """Whether the hidden activations of an MLP stay whole."""
    factor = 2 if training and not _onednn() else 1
    return math.prod(x.shape[:-1]) * hidden <= KEEP_ELEMENTS * factor


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
        [..., N]. With oneDNN gradients are differentiable once.

    Raises:
        ValueError: for an unknown activation, or shapes that do not fit.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f"activation is {activation!r}; allowed are None and 'gelu'")
    _check_shapes("weight", x, weight, bias)
    if _takes_float32(x, weight, bias):
        return _in_float32(lambda x, w, b: linear(x, w, b, activation), x, weight, bias)
    if not (_onednn() and _takes_leaf(x, weight, bias)):
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
    """residual + gelu(x W1^T + b1) W2^T + b2, in chunks of the rows where that is large.

    Args:
        x: [..., K], any dtype and device.
        fc1_weight, fc1_bias: [H, K] and [H].
        fc2_weight, fc2_bias: [N, H] and [N].
        residual: [..., N] or None for no residual.

    Returns:
        [..., N]. With oneDNN or in chunks gradients are differentiable once.

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
    if _takes_float32(*tensors):
        return _in_float32(mlp, *tensors)
    needs_grad = _needs_grad(*tensors)
    keep = _keeps(x, fc1_weight.shape[0], needs_grad)
    if not _takes_leaf(*tensors) or (keep and not _onednn()):
        y = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        return y if residual is None else residual + y
    if not needs_grad:
        return torch.ops.xattn_ops.mlp_fwd(*tensors, False, _onednn())[0]
    if residual is x:  # torch.compile takes no tensor twice in one Function
        return residual + _Mlp.apply(*tensors[:5], None, keep, _onednn())[0]
    return _Mlp.apply(*tensors, keep, _onednn())[0]


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
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.xattn_ops.mlp_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w1, b1, w2 = inputs[:4]
        ctx.save_for_backward(x, w1, b1, w2, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.onednn = inputs[7]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        need = list(ctx.needs_input_grad[:6])
        grads = torch.ops.xattn_ops.mlp_bwd(grad, *ctx.saved_tensors, need[:5], ctx.onednn)
        grads = (*grads, grad)  # the residual's gradient is grad itself
        return (*(g if n else None for g, n in zip(grads, need, strict=True)), None, None)
