"""Cross-patch self-attention with its weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .interface import cross_patch_attention


class CrossPatchAttention(nn.Module):
    """y = cross_patch_attention(x) with the weights `qkv` and `proj`, CAT's CPSA.

    x [B, H, W, C] -> [B, H, W, C] for any C; the weights are shared by all channels.

    Args:
        patch: rows and columns; H and W of x need not be multiples of them.
        num_heads: divides the pixels of a patch.
        qkv_bias: whether the qkv layer has a bias.
        scale: factor on the logits; None: (pixels / num_heads) ** -0.5.
        attn_drop, proj_drop: dropout in training, on the attention weights and on the output.
        backend: of the attention; None: the first that can.
    """

    def __init__(
        self,
        patch: tuple[int, int] = (7, 7),
        num_heads: int = 1,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.patch = _checks.pair("patch", patch, 1)
        pixels = self.patch[0] * self.patch[1]
        _checks.divides("num_heads", num_heads, "the pixels of a patch", pixels)
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = _checks.probability("attn_drop", attn_drop)
        self.proj_drop = _checks.probability("proj_drop", proj_drop)
        self.backend = backend
        self.qkv = nn.Linear(pixels, 3 * pixels, bias=qkv_bias)
        self.proj = nn.Linear(pixels, pixels)

    def forward(self, x: Tensor) -> Tensor:
        out = cross_patch_attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            self.proj.weight,
            self.proj.bias,
            patch=self.patch,
            num_heads=self.num_heads,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        return F.dropout(out, self.proj_drop, self.training)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, num_heads={self.num_heads}"
