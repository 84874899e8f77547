"""The same operators as a user would write them in plain PyTorch: what the fused kernels must beat.

Each function takes the operands of its case and nothing else, so that it can be run as it is, put
through torch.compile and differentiated. Maps here are whole windows (the models' shapes), so no
formulation pays for padding that it would not need.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import CrossPatchAttention, InnerPatchAttention, _linear

Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> weighted v
Plain = Callable[..., Tensor]


def relative_index(rows: int, columns: int) -> Tensor:
    """[N, N]: which row of the bias table query i and key j take."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """[(2h-1)(2w-1), heads] and [N, N] -> dense bias [heads, N, N]."""
    tokens = index.shape[0]
    return table[index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)


def windows_of(qkv: Tensor, heads: int, window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, W, 3C] -> q, k, v, each [B * windows, heads, N, D]."""
    batch, height, width, _ = qkv.shape
    rows, columns = window
    grid = qkv.reshape(batch, height // rows, rows, width // columns, columns, 3, heads, -1)
    # -> [3, B, gh, gw, heads, rows, columns, D]
    q, k, v = grid.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3).flatten(3, 4).unbind(0)
    return q, k, v


def map_of(windows: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """[B * windows, heads, N, D] -> [B, H, W, heads * D]."""
    (height, width), (rows, columns) = size, window
    _, heads, _, dim = windows.shape
    grid = windows.view(-1, height // rows, width // columns, heads, rows, columns, dim)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads * dim)


def eager_core(bias: Tensor) -> Core:
    """softmax(q k^T / sqrt(D) + bias) v, as the official code of CAT has it."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        return logits.softmax(-1) @ v

    return core


def sdpa_core(bias: Tensor) -> Core:
    """scaled_dot_product_attention with the bias as a dense mask."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias.expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return core


def flex_core(bias: Tensor) -> Core:
    """flex_attention with the bias as a score_mod; it has no backward on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    def with_bias(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[head, i, j]

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, score_mod=with_bias)
        assert isinstance(out, Tensor)
        return out

    return core


def ipsa_dense(make_core: Callable[[Tensor], Core], heads: int, window: tuple[int, int]) -> Plain:
    """IPSA on (qkv [B, H, W, 3C], bias [heads, N, N]): for inference it is gathered once."""

    def ipsa(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = windows_of(qkv, heads, window)
        size = (qkv.shape[1], qkv.shape[2])
        return map_of(make_core(bias)(q, k, v), size, window)

    return ipsa


def ipsa_table(make_core: Callable[[Tensor], Core], heads: int, window: tuple[int, int]) -> Plain:
    """IPSA on (qkv, table [(2h-1)(2w-1), heads]): a training step owes the table its gradient."""
    index = relative_index(*window)
    dense = ipsa_dense(make_core, heads, window)

    def ipsa(qkv: Tensor, table: Tensor) -> Tensor:
        return dense(qkv, gather_bias(table, index))

    return ipsa


def with_linears(core: Plain) -> Plain:
    """An IPSA on (qkv, bias or table) between the module's two linears."""

    def module(
        x: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return F.linear(core(F.linear(x, qkv_weight, qkv_bias), bias), proj_weight, proj_bias)

    return module


def cpsa(attend: Callable[[Tensor, Tensor, Tensor], Tensor], patch: tuple[int, int]) -> Plain:
    """CPSA, single head, on (x [B, H, W, C], qkv_weight, qkv_bias, proj_weight, proj_bias)."""
    rows, columns = patch

    def module(
        x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
    ) -> Tensor:
        batch, height, width, channels = x.shape
        gh, gw = height // rows, width // columns
        grid = x.reshape(batch, gh, rows, gw, columns, channels).permute(0, 5, 1, 3, 2, 4)
        tokens = grid.reshape(batch * channels, gh * gw, rows * columns)
        q, k, v = F.linear(tokens, qkv_weight, qkv_bias).chunk(3, -1)
        out = F.linear(attend(q, k, v), proj_weight, proj_bias)
        grid = out.view(batch, channels, gh, gw, rows, columns).permute(0, 2, 4, 3, 5, 1)
        return grid.reshape(batch, height, width, channels)

    return module


def attend_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over [units, T, P], spelled out."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through scaled_dot_product_attention, which wants a head axis."""
    out = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
    return out.squeeze(1)


class PlainInnerPatch(InnerPatchAttention):
    """IPSA as the official code has it; takes over a module that `plain_copy` made."""

    formulation: Plain

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)
        return self.formulation(x, *weights, self.relative_position_bias_table)


class PlainCrossPatch(CrossPatchAttention):
    """CPSA as the official code has it; takes over a module that `plain_copy` made."""

    formulation: Plain

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)
        return self.formulation(x, *weights)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a block or model with every attention in the official formulation.

    Run it within `plain_linears`, or the other linears stay the library's.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, InnerPatchAttention):
            module.__class__ = PlainInnerPatch
            core = ipsa_table(eager_core, module.num_heads, module.window)
            module.formulation = with_linears(core)  # type: ignore[assignment]
        elif isinstance(module, CrossPatchAttention):
            module.__class__ = PlainCrossPatch
            module.formulation = cpsa(attend_eager, module.patch)  # type: ignore[assignment]
    return twin


@contextmanager
def plain_linears() -> Iterator[None]:
    """Let the models' linears be F.linear, as those of the official code are."""
    before = _linear.PREFER_ONEDNN
    _linear.PREFER_ONEDNN = False
    try:
        yield
    finally:
        _linear.PREFER_ONEDNN = before


def compiled(function: Plain) -> Plain:
    """torch.compile for the one shape at hand; raises where there is no compiler."""
    return torch.compile(function, dynamic=False)
