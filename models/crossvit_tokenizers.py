"""How CrossViT makes tokens of an image: [B, 3, H, W], whole patches -> [B, H/p, W/p, C]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops._linear import linear
from xattn_ops.models.layers import Linear, Mlp

# (stride, padding) of the steps from pixels to patches; kernels are 7, 3 and 3 wide
STEPS = {12: ((4, 3), (3, 0), (1, 1)), 16: ((4, 3), (2, 1), (2, 1))}
KERNELS = (7, 3, 3)


class LinearEmbed(nn.Module):
    """Every patch through one linear layer."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        # the map of a channels-last image is its tokens
        image = image.contiguous(memory_format=torch.channels_last)
        return self.proj(image).permute(0, 2, 3, 1)


class ConvEmbed(LinearEmbed):
    """Three convolutions with ReLU between (paper, table 1, the models with a dagger)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__(dim, patch)
        widths = (3, dim // 4, dim // 2, dim)
        layers: list[nn.Module] = []
        for i, (stride, padding) in enumerate(_steps(patch)):
            layers += [nn.Conv2d(widths[i], widths[i + 1], KERNELS[i], stride, padding), nn.ReLU()]
        self.proj = nn.Sequential(*layers[:-1])


class TokenTransformer(nn.Module):
    """One block of T2T (arXiv 2101.11986, 3.1): [B, N, dim] -> [B, N, width], one head.

    v stands for the shortcut of the attention, for x has another width.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * width, bias=False)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, -1)  # [B, 1 head, N, width]
        x = v.squeeze(1) + self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self.mlp(self.norm2(x), residual=x)


class T2TEmbed(nn.Module):
    """Tokens-to-token (arXiv 2101.11986, 3.1): three overlapping splits, attention between them.

    CrossViT's section 4.3, "Cooperation with Concurrent Works", puts it in place of the linear
    embedding of both branches; the steps to patches of 12 are those of the convolutions.
    """

    WIDTH = 64  # of the tokens between the splits

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        # T2T pads its first split by 2 where the convolution has 3: the maps are the same
        (stride, _), *rest = _steps(patch)
        self.splits = [
            (KERNELS[0], stride, 2),
            *((k, *s) for k, s in zip(KERNELS[1:], rest, strict=True)),
        ]
        self.attention1 = TokenTransformer(3 * KERNELS[0] ** 2, self.WIDTH)
        self.attention2 = TokenTransformer(self.WIDTH * KERNELS[1] ** 2, self.WIDTH)
        self.project = nn.Linear(self.WIDTH * KERNELS[2] ** 2, dim)

    def forward(self, image: Tensor) -> Tensor:
        for split, attention in zip(self.splits, (self.attention1, self.attention2), strict=False):
            tokens, grid = _split(image, *split)
            image = attention(tokens).mT.unflatten(-1, grid)  # [B, width, h, w]
        tokens, grid = _split(image, *self.splits[2])
        return linear(tokens, self.project.weight, self.project.bias).unflatten(1, grid)


def _split(image: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, int]]:
    """Overlapping windows of [B, C, H, W] as tokens [B, h w, C kernel^2], and (h, w)."""
    height, width = ((s + 2 * padding - kernel) // stride + 1 for s in image.shape[2:])
    tokens = F.unfold(image, kernel, stride=stride, padding=padding).mT
    return tokens, (height, width)


def _steps(patch: int) -> tuple[tuple[int, int], ...]:
    if patch not in STEPS:
        raise ValueError(f"patches holds {patch}; this tokenizer makes patches of 12 and 16 pixels")
    return STEPS[patch]


TOKENIZERS = {"linear": LinearEmbed, "conv": ConvEmbed, "t2t": T2TEmbed}
