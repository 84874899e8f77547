"""Each operator on the photo's own activations: right, how much work, how fast."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xattn_ops import (
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    DigestAttention,
    InnerPatchAttention,
    flops,
)
from xattn_ops.benchmarks.baselines import plain_linears
from xattn_ops.benchmarks.runner import Check, compare
from xattn_ops.benchmarks.timing import Timing, interleaved
from xattn_ops.demo.attention import cross_patch_weights, inner_patch_weights
from xattn_ops.models.cabvit_blocks import CaBlock

Operator = (
    InnerPatchAttention
    | CrossPatchAttention
    | ConvRelativeAttention
    | ConvPositionEncoding
    | DigestAttention
)
OPERATORS: dict[type[nn.Module], str] = {  # in the order in which they are shown
    InnerPatchAttention: "ipsa",
    CrossPatchAttention: "cpsa",
    ConvRelativeAttention: "convrel",
    ConvPositionEncoding: "convpos",
    DigestAttention: "digest",
}


@dataclass(frozen=True)
class Captured:
    """One operator's module in a model, and what entered it.

    x: a map [1, H, W, C], or the tokens [1, N, C] of an image of `grid` (H, W).
    """

    operator: str
    stage: int
    module: Operator
    x: Tensor
    grid: tuple[int, int]
    digests: Tensor | None = None  # [1, M, C], of digest attention

    @property
    def shape(self) -> str:
        return "x".join(str(size) for size in (*self.grid, self.x.shape[-1]))

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of the module's window (IPSA) or patch (CPSA)."""
        assert isinstance(self.module, InnerPatchAttention | CrossPatchAttention)
        module = self.module
        return module.window if isinstance(module, InnerPatchAttention) else module.patch

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What the module takes for this x."""
        if isinstance(self.module, DigestAttention):
            few = self.digests
            return (x, None if few is None else few.to(x.dtype).expand(len(x), -1, -1))
        return (x,) if x.dim() == 4 else (x, self.grid)

    def weights(self) -> Tensor:
        """The attention weights of a CAT module on x: see `attention`."""
        if isinstance(self.module, InnerPatchAttention):
            return inner_patch_weights(self.module, self.x)
        assert isinstance(self.module, CrossPatchAttention)
        return cross_patch_weights(self.module, self.x)


@dataclass(frozen=True)
class Measured:
    """What is printed of one captured module."""

    captured: Captured
    check: Check
    magnitude: float  # mean of |output|
    formula_macs: int
    counted_macs: int
    fused: Timing
    eager: Timing

    @property
    def faster(self) -> str:
        """How many times faster ours is, or "busy" where the machine did not let us say."""
        if self.fused.busy("xattn_ops") or self.eager.busy("eager"):
            return "busy"
        return f"{self.eager.median / self.fused.median:.1f}x"


class OfOne(nn.Module):
    """A module as a function of its first argument alone."""

    def __init__(self, module: nn.Module, *rest: Any) -> None:
        super().__init__()
        self.module = module
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, *self.rest)


@torch.no_grad()
def capture(model: nn.Module, image: Tensor) -> tuple[list[Captured], Any]:
    """Run the model once; returns one of each operator in every stage, and its output.

    It is the first, but of digest attention, which then has no digests, the last. A stage is one
    of the feature maps that the model gives, counted from 1.
    """
    found: dict[tuple[str, tuple[int, int]], Captured] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Operator)
        x = inputs[0].detach()
        grid = (x.shape[1], x.shape[2]) if x.dim() == 4 else inputs[1]
        if isinstance(module, CaBlock):
            alone = attention_of(module, grid, inputs[2])
            one = Captured("digest", 0, alone, module.norm1(x), grid, inputs[2])
            found[one.operator, grid] = one
            return
        one = Captured(OPERATORS[type(module)], 0, module, x.clone(), grid)
        found.setdefault((one.operator, grid), one)

    hooks = [
        module.register_forward_pre_hook(remember)
        for module in model.modules()
        if isinstance(module, Operator)
    ]
    try:
        output = model(image)
    finally:
        for handle in hooks:
            handle.remove()
    stages = {tuple(y.shape[2:]): stage for stage, y in enumerate(output, start=1)}
    order = list(OPERATORS.values())
    staged = [replace(one, stage=stages[grid]) for (_, grid), one in found.items()]
    return sorted(staged, key=lambda one: (order.index(one.operator), one.stage)), output


def attention_of(block: CaBlock, grid: tuple[int, int], digests: Tensor | None) -> DigestAttention:
    """The attention of a CabViT block as a module of its own, with the tables of this grid."""
    tables, state = block.tables_on(grid), block.state_dict()
    module = DigestAttention(
        block.qkv.in_features,
        block.num_heads,
        grid,
        0 if digests is None else digests.shape[1],
        num_prefix_tokens=block.num_prefix_tokens,
        digest_scale=tables.digest_scale is not None,
        backend=block.backend,
    )
    state["attention_biases"] = tables.bias
    if tables.digest_bias is not None:
        state["s_token_bias"] = tables.digest_bias[None, :, None]
    if tables.digest_scale is not None:
        state["s_scale_factors"] = tables.digest_scale
    module.load_state_dict({key: state[key] for key in module.state_dict()})
    return module.eval()


@torch.no_grad()
def measure(captured: Captured, batch: int, budget: float) -> Measured:
    """Compare one module with its reference formulation, in float64 and in eager float32.

    Eager is what a user would have: the equation and F.linear.
    """
    module, x = captured.module, captured.x
    eager = reference_of(module)
    exact = reference_of(module).double()(*captured.arguments(x.double()))
    one = captured.arguments(x)
    counted = OfOne(module, *one[1:])
    several = captured.arguments(x.expand(batch, *x.shape[1:]).contiguous())

    def run_eager(*arguments: Any) -> Tensor:
        with plain_linears():
            return eager(*arguments)

    fused_out, eager_out = module(*one), run_eager(*one)
    timings = interleaved(
        {"fused": lambda: module(*several), "eager": lambda: run_eager(*several)}, budget=budget
    )
    return Measured(
        captured=captured,
        check=compare([fused_out], [eager_out], [exact]),
        magnitude=exact.abs().mean().item(),
        formula_macs=formula(captured),
        counted_macs=flops.count(counted, x.shape)[""],
        fused=timings["fused"],
        eager=timings["eager"],
    )


def formula(captured: Captured) -> int:
    """MACs by the papers' formulas: equations 2 and 3 of CAT, 12 of CoaT, 1 to 4 of CabViT."""
    module, channels = captured.module, captured.x.shape[-1]
    if isinstance(module, DigestAttention):
        return flops.digest(captured.x.shape[1], channels, module.num_digests)
    if isinstance(module, InnerPatchAttention):
        return flops.ipsa(*captured.grid, channels, captured.window)
    if isinstance(module, CrossPatchAttention):
        return flops.cpsa(*captured.grid, channels, captured.window)
    height, width = captured.grid
    if isinstance(module, ConvPositionEncoding):
        return height * width * module.proj.weight.numel()
    head_dim = channels // module.num_heads
    convolutions = [] if module.crpe is None else [w.shape for w in module.crpe.tensors()[0]]
    windows = {shape[-1]: shape[0] // head_dim for shape in convolutions}
    sizes = (height, width, channels, module.num_heads)
    return flops.conv_relative(*sizes, windows, module.num_prefix_tokens)


def reference_of(module: Operator) -> Operator:
    """A copy of the module that computes the equation in plain PyTorch."""
    twin = copy.deepcopy(module)
    twin.backend = "reference"
    return twin.eval()
