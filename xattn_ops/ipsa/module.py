"""Inner-patch self-attention with its linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._linear import apply_linear, is_plain
from .block import PackedWeights, takes_block
from .interface import inner_patch_attention


class WindowAttentionLayers:
    """What a module of window attention does with its layers `qkv` and `proj` and its bias table.

    Without gradients, in float32 on the CPU, the three steps run as one pass over the windows.
    """

    num_heads: int
    backend: str | None
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: nn.Parameter
    _packed: PackedWeights

    def _attend(
        self,
        x: Tensor,
        window: tuple[int, int],
        shift: tuple[int, int],
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """proj(inner_patch_attention(qkv(x))); padding is what qkv makes of a zero token."""
        square = self.qkv.out_features == 3 * self.qkv.in_features
        if dropout_p == 0 and square and is_plain(self.qkv) and is_plain(self.proj):
            weights = [self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias]
            tensors = [*weights, self.relative_position_bias_table]
            if takes_block(x, tensors, window, self.backend):
                return self._one_pass(x, window, shift, scale)
        out = inner_patch_attention(
            apply_linear(self.qkv, x),
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window=window,
            shift=shift,
            pad_qkv=self.qkv.bias,
            scale=scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )
        return apply_linear(self.proj, out)

    def _one_pass(
        self, x: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float | None
    ) -> Tensor:
        dim = self.qkv.in_features
        _checks.tensor("x", x, f"[B, H, W, {dim}]", sizes=(*x.shape[:3], dim))
        return torch.ops.xattn_ops.ipsa_block_fwd(
            x,
            self._packed.get("qkv", self.qkv.weight),
            self.qkv.bias,
            self._packed.get("proj", self.proj.weight),
            self.proj.bias,
            self.relative_position_bias_table,
            self.num_heads,
            *window,
            *shift,
            _checks.scale(scale, dim // self.num_heads),
        )


class InnerPatchAttention(WindowAttentionLayers, nn.Module):
    """y = proj(inner_patch_attention(qkv(x))), CAT's IPSA: x [B, H, W, dim] -> [B, H, W, dim].

    Without gradients, in float32 on the CPU, the three steps run as one pass over the windows.

    Args:
        dim: channels; num_heads divides it.
        window, shift: rows and columns; H and W of x need not be multiples of the window.
        qkv_bias: whether the qkv layer has a bias, which then is q, k and v of the padding, as of
            any zero token.
        scale: factor on the logits; None: (dim / num_heads) ** -0.5.
        attn_drop, proj_drop: dropout in training, on the attention weights and on the output.
        backend: of the attention; None: the first that can.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int] = (7, 7),
        shift: tuple[int, int] = (0, 0),
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.divides("num_heads", num_heads, "dim", _checks.integer("dim", dim, 1))
        self.num_heads = num_heads
        self.window = _checks.pair("window", window, 1)
        self.shift = _checks.shift(shift, self.window)
        self.scale = scale
        self.attn_drop = _checks.probability("attn_drop", attn_drop)
        self.proj_drop = _checks.probability("proj_drop", proj_drop)
        self.backend = backend
        offsets = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self._packed = PackedWeights()

    def forward(self, x: Tensor) -> Tensor:
        dropout_p = self.attn_drop if self.training else 0.0
        out = self._attend(x, self.window, self.shift, self.scale, dropout_p)
        return F.dropout(out, self.proj_drop, self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}, shift={self.shift}"
