"""CabViT's blocks as the official code has them: maps [B, C, H, W], one layer after another.

Between blocks our models hand on maps [B, H, W, C]; a plain one takes and gives permuted views of
[B, C, H, W], so that its memory is laid out as in the official code, or, with an image in
channels-last memory, as a careful user of it would have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops.benchmarks.baselines.digest import offset_index
from xattn_ops.models.cabvit_blocks import CaBlock, ConvNeXtBlock, Grid
from xattn_ops.models.cabvit_convs import ConvNorm


class PlainConvNorm(ConvNorm):
    """Convolution, then BatchNorm; takes over a module that `plain_copy` made."""

    def prepare(self) -> None:
        """Let BatchNorm be torch's own."""
        self.bn.__class__ = nn.BatchNorm2d  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class PlainConvNeXtBlock(ConvNeXtBlock):
    """The ConvNeXt block, likewise."""

    def prepare(self) -> None:
        """Nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return self.drop_path(y, x)


class PlainCaBlock(CaBlock):
    """The CabViT block, likewise: digests are concatenated and projected to queries as well."""

    index: Tensor
    gathered: Tensor

    def prepare(self) -> None:
        """Keep the index of the bias, and without training the bias itself; norm maps."""
        self.register_buffer("index", offset_index(self.grid), persistent=False)
        bias = self.attention_biases[:, self.index].detach()
        self.register_buffer("gathered", None if self.training else bias, persistent=False)
        self.local_conv.bn.__class__ = nn.BatchNorm2d

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: Grid, digests: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, count, dim = x.shape
        y = self.norm1(x)
        bias = self.attention_biases[:, self.index] if self.gathered is None else self.gathered
        if digests is not None:
            assert self.s_norm is not None
            assert self.s_token_bias is not None
            scaled = digests if self.s_scale_factors is None else digests * self.s_scale_factors
            y = torch.cat((y, self.s_norm(scaled)), 1)
            far = self.s_token_bias[0].expand(-1, count, -1)
            bias = torch.cat((bias, far), 2)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q[:, :, :count] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, dim)
        x = self.drop_path(self.gamma_1 * self.proj(y), x)

        image = x.transpose(1, 2).reshape(batch, dim, *grid)
        digest = None if self.dw_conv is None else self.dw_conv(image).flatten(2).transpose(1, 2)
        x = self.local_conv(image).flatten(2).transpose(1, 2)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(self.mlp.norm(self.norm2(x)))))
        return self.drop_path(self.gamma_2 * y, x), digest


PLAIN_CABVIT: dict[type[nn.Module], type[nn.Module]] = {
    ConvNorm: PlainConvNorm,
    ConvNeXtBlock: PlainConvNeXtBlock,
    CaBlock: PlainCaBlock,
}
