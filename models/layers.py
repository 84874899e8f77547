"""Layers that the model families share. Activations are [..., C], channels last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xattn_ops._linear import linear, mlp

norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, H // patch, W // patch, dim]: whole patches projected, LayerNorm."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)  # the map then is so too
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class DropPath(nn.Module):
    """shortcut + branch, where in training a sample's branch is dropped with probability `rate`.

    Kept branches are scaled by 1 / (1 - rate) (stochastic depth, arXiv 1603.09382).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate is {rate}; it must be in [0, 1)")
        self.rate = rate

    @property
    def active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        if not self.active:
            return shortcut + branch
        keep = 1 - self.rate
        samples = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1))
        return torch.addcmul(shortcut, branch, samples.bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Linear(nn.Linear):
    """nn.Linear through the library's `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with an optional residual added in the same pass.

    drop: dropout in training, after the GELU and after fc2.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = drop

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if self.training and self.drop > 0:
            hidden = F.dropout(linear(x, fc1.weight, fc1.bias, "gelu"), self.drop)
            y = F.dropout(linear(hidden, fc2.weight, fc2.bias), self.drop)
            return y if residual is None else residual + y
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)


def add_mlp(mlp: nn.Module, x: Tensor, shortcut: Tensor, drop_path: DropPath) -> Tensor:
    """shortcut + DropPath(mlp(x)); one pass where no path may be dropped."""
    if drop_path.active:
        return drop_path(mlp(x), shortcut)
    return mlp(x, residual=shortcut)


def run(block: Callable[..., Any], *args: Any, recompute: bool) -> Any:
    """block(*args); with recompute, backward computes its activations anew instead of keeping them.

    The random numbers are the same both times; running statistics are updated once.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*args)
    norms = _batch_norms(block)
    if not norms or torch.compiler.is_compiling():  # a compiler repeats no updates of buffers
        return checkpoint(block, *args, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def _batch_norms(block: Callable[..., Any]) -> list[Any]:
    modules = block.modules() if isinstance(block, nn.Module) else ()
    return [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _statistics_kept(norms: list[Any]) -> Iterator[None]:
    """What BatchNorms see in training moves their running statistics by nothing."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = kept


def image_size(img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """`create_model`'s img_size as (height, width); None: 224 x 224."""
    size = 224 if img_size is None else img_size
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"img_size is {img_size!r}; it must be a positive int or a pair of them")
    return pair


def check_image(image: Tensor) -> tuple[int, int]:
    """Height and width of an image [B, 3, H, W] with at least one pixel; ValueError for others."""
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image is {list(image.shape)}; it must be [B, 3, H, W]")
    height, width = image.shape[2:]
    if height < 1 or width < 1:
        raise ValueError(f"image is {list(image.shape)}; its sides must be at least 1")
    return height, width


def resize(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *grid], bilinear; itself where the size is right already."""
    if tuple(image.shape[2:]) == grid:
        return image
    return F.interpolate(image, size=grid, mode="bilinear", align_corners=False)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros to the right and bottom of [B, H, W, C] until `multiple` divides H and W."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def interleave(x: Tensor) -> Tensor:
    """[B, H, W, C], H and W even -> [B, H/2, W/2, 4C].

    The four pixels of a 2x2 block follow one another in the order of CAT's patch projection:
    top left, bottom left, top right, bottom right.
    """
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c)  # [B, h, dy, w, dx, C]
    return blocks.permute(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)


def init_weights(module: nn.Module) -> None:
    """Truncated normal (0.02) for linear weights, zero for their biases; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
