"""Whole blocks and whole models, ours against the official formulation of every operator inside."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from xattn_ops import (
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    InnerPatchAttention,
    flops,
)
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import FORWARD, STEP, Case, Maker, Variant
from xattn_ops.benchmarks.cases.shapes import Grid, Stage, WithDigests
from xattn_ops.models import create_model, list_models
from xattn_ops.models.cabvit import CabViT
from xattn_ops.models.cabvit_blocks import CaBlock
from xattn_ops.models.cat import Block
from xattn_ops.models.coat_blocks import Rates, SerialBlock
from xattn_ops.papers.measure import side_of


class OnGrid(nn.Module):
    """A module of tokens [B, N, C] and their grid as a function of the tokens alone."""

    def __init__(self, module: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.module = module
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, self.grid)


class AfterOthers(nn.Module):
    """A CabViT block as a function of its tokens alone, with digests of the blocks before it."""

    digests: Tensor

    def __init__(self, block: CaBlock, digests: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("digests", digests)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.block.grid, self.digests[: x.shape[0]])[0]


def cab_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A whole cross-attention block: IPSA, CPSA, IPSA, each with its norms and MLP."""
    width, window = stage.channels, stage.window
    torch.manual_seed(0)
    block = nn.Sequential(
        Block(width, InnerPatchAttention(width, stage.heads, window), 4.0, 0.0),
        Block(width, CrossPatchAttention(window), 4.0, 0.0),
        Block(width, InnerPatchAttention(width, stage.heads, window), 4.0, 0.0),
    )
    x = Maker(dtype, direction)(batch, stage.height, stage.width, width)
    return _module_case("cab", str(stage), block, x, direction)


def coat_block_case(grid: Grid, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A serial block of CoaT-Lite: position encoding, attention, MLP, with their norms."""
    width, batch = grid.channels, grid.batch(batch)
    torch.manual_seed(0)
    attention = ConvRelativeAttention(
        width, grid.heads, windows=dict(grid.windows), num_prefix_tokens=grid.prefix
    )
    encoding = ConvPositionEncoding(width, num_prefix_tokens=grid.prefix)
    mlp_ratio = 8 if grid.height >= 28 else 4  # of CoaT-Lite small's scales at 224 pixels
    block = OnGrid(SerialBlock(width, mlp_ratio, attention, encoding, Rates(0.0, 0.0)), grid.size)
    x = Maker(dtype, direction)(batch, grid.tokens, width)
    return _module_case("coat_block", str(grid), block, x, direction)


def cabvit_block_case(shape: WithDigests, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A CabViT block, the last of its stage: attention with digests, enhancement, MLP."""
    torch.manual_seed(0)
    block = CaBlock(
        shape.channels,
        shape.size,
        shape.earlier,
        False,
        0.0,
        head_dim=shape.head_dim,
        mlp_ratio=4.0,
        attn_drop=0.0,
        layer_scale=0.1,
        backend=None,
    )
    digests = torch.randn(batch, shape.digests, shape.channels)
    x = Maker(dtype, direction)(batch, shape.tokens, shape.channels)
    return _module_case("cabvit_block", str(shape), AfterOthers(block, digests), x, direction)


def model_case(name: str, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A whole classifier at its own image size, without stochastic depth."""
    check_model(name)
    torch.manual_seed(0)
    model = create_model(name, drop_path=0.0)
    side = side_of(name)
    image = Maker(dtype, FORWARD)(batch, 3, side, side)
    case = _module_case(name, f"{side}x{side}", model, image, direction)
    if isinstance(model, CabViT):
        case = replace(case, plain=case.plain | _channels_last(case.plain["eager"]))
    return case


def _channels_last(eager: Variant) -> dict[str, Variant]:
    """The same on an image in channels-last memory, whose layout all convolutions follow."""
    (image,) = eager.arguments
    image = image.detach().contiguous(memory_format=torch.channels_last)
    nhwc = replace(eager, arguments=(image,))
    return {"nhwc": nhwc, "nhwc + compile": nhwc.compiled()}


def check_model(name: str) -> None:
    """Raise ValueError unless there is such a model."""
    if name not in list_models():
        raise ValueError(f"no model {name!r}; there are {', '.join(list_models())}")


def _module_case(operator: str, shape: str, module: nn.Module, x: Tensor, direction: str) -> Case:
    """Ours as it is and compiled, against the official formulation as it is and compiled."""
    module.to(x.dtype).train(direction == STEP)
    return compare_modules(operator, shape, module, baselines.plain_copy(module), x, direction)


def compare_modules(
    operator: str, shape: str, module: nn.Module, plain: nn.Module, x: Tensor, direction: str
) -> Case:
    """Ours as it is and compiled, against another as it is and compiled.

    Both have x's dtype, the same parameters, and are in the mode for the direction.
    """
    exact = copy.deepcopy(plain).double()

    def variant(module: nn.Module, x: Tensor) -> Variant:
        named = sorted(module.named_parameters())
        weights = tuple(p for _, p in named if p.requires_grad)  # CoaT has norms that nothing reads
        leaves = (x, *weights) if x.requires_grad else weights
        return Variant(module, (x,), leaves)

    ours = variant(module, x)
    eager = replace(variant(plain, x), within=baselines.plain_linears)
    return Case(
        operator=operator,
        shape=shape,
        batch=x.shape[0],
        dtype=x.dtype,
        direction=direction,
        ours={"fused": ours, "fused + compile": ours.compiled()},
        plain={"eager": eager, "compile": eager.compiled()},
        oracle=variant(exact, x.detach().double().requires_grad_(x.requires_grad)),
        macs=x.shape[0] * flops.count(plain, (1, *x.shape[1:]))[""],
        dense_bytes=0,
        tokens=0,
    )
