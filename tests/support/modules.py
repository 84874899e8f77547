"""Modules of tokens as modules of maps, so that one test can call every operator's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OnMap(nn.Module):
    """A module of tokens as one of maps [B, H, W, C]: puts a prefix token first, drops it after."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1)
        grid = x.shape[1], x.shape[2]
        return self.of_tokens(tokens, grid)[:, 1:].unflatten(1, grid)

    def of_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.module(tokens, grid)
