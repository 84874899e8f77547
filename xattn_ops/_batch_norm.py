"""BatchNorm over rows of channels whose sums are as exact as those of other layouts.

In training torch (2.13) adds up all samples of a channel in one float32 where channels lie next to
one another, in rows [M, C] and in maps in channels-last memory. With 8 maps of 112 x 112 results
are off by 1e-5 of the largest, where those of maps in contiguous memory, added up in float64, are
by 1e-7; what a bias before the norm sums up of it is off by more. Here groups of 16 samples, or a
few more where 16 does not divide their number, have sums of their own, in the same number of
passes. It serves float32 on the CPU; all else is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SAMPLES = range(16, 128)  # that may be added up in one float32


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d, with exact sums for rows [M, C]."""

    def forward(self, x: Tensor) -> Tensor:
        exact = self.training and x.dim() == 2 and x.is_contiguous() and _takes(self, x)
        return _normalised(self, x) if exact else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, with exact sums for maps [B, C, H, W] in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        layout = torch.channels_last
        exact = self.training and x.dim() == 4 and x.is_contiguous(memory_format=layout)
        if not (exact and _takes(self, x)):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1)
        return _normalised(self, rows.flatten(0, 2)).view(rows.shape).permute(0, 3, 1, 2)


def _takes(norm: Any, x: Tensor) -> bool:
    return (
        norm.weight is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > x.shape[1]  # torch says what is wrong with one sample a channel
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """[M, C] -> [M, C]; the running statistics move on."""
    y, mean, var = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps)
    if not norm.track_running_stats:
        return y
    count, share = norm.num_batches_tracked, norm.momentum
    if count is not None:
        count.add_(1)
    if share is None:  # the mean of all batches
        share = 0.0 if count is None else 1 / count.item()
    unbiased = var * (len(x) / (len(x) - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.lerp_(value, share)
    return y


class _BatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, its mean and its var; x: [M, C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, image = _grouped(x)
        means, variances = (
            t.view(groups, -1) for t in torch.batch_norm_update_stats(image, None, None, 0.0)
        )
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        inverse = (var + eps).rsqrt()
        scale = weight * inverse
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.addcmul(torch.addcmul(bias, mean, scale, value=-1), x, scale), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        groups, image = _grouped(x)
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            _grouped(grad)[1],
            image,
            None,
            None,
            None,
            mean.repeat(groups),
            inverse.repeat(groups),
            True,
            ctx.eps,
            [False, True, True],
        )
        dweight, dbias = (t.view(groups, -1).sum(0) for t in (dweight, dbias))
        # dx = scale (grad - mean of grad - xhat * mean of grad xhat)
        scale = weight * inverse / -len(x)
        dx = torch.addcmul(scale * dbias, grad, weight * inverse)
        dx.addcmul_(x - mean, scale * inverse * dweight)
        return dx, dweight, dbias, None


def _grouped(x: Tensor) -> tuple[int, Tensor]:
    """[M, C] as a map of groups * C channels, of which M / groups samples are added up."""
    count, channels = x.shape
    samples = next((n for n in SAMPLES if count % n == 0), count)
    groups = count // samples
    return groups, x.view(1, 1, samples, groups * channels).permute(0, 3, 1, 2)
