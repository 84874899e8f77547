"""Layers that the model families share. Activations are [..., C], channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops._linear import linear, mlp


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
    """fc2(gelu(fc1(x))), with an optional residual added in the same pass."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual)


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
