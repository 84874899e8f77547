"""Each operator on the photo's own activations: right, how much work, how fast."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xattn_ops import (
    ClsCrossAttention,
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
    | ClsCrossAttention
)
OPERATORS: dict[type[nn.Module], str] = {  # in the order in which they are shown
    InnerPatchAttention: "ipsa",
    CrossPatchAttention: "cpsa",
    ConvRelativeAttention: "convrel",
    ConvPositionEncoding: "convpos",
    DigestAttention: "digest",
    ClsCrossAttention: "clsattn",
}


@dataclass(frozen=True)
class Captured:
    """One operator's module in a model, and what entered it.

    inputs: a map [1, H, W, C]; or the tokens [1, N, C] of an image of `grid` (H, W), and `grid` or
        digests [1, M, C] or None; or a CLS token, the patches [1, N, C] of an image of `grid` and
        the LayerNorm over both.
    """

    operator: str
    stage: int
    module: Operator
    inputs: tuple[Any, ...]
    grid: tuple[int, int]

    @property
    def x(self) -> Tensor:
        """The map, the tokens or the patches."""
        return self.inputs[1 if isinstance(self.module, ClsCrossAttention) else 0]

    @property
    def shape(self) -> str:
        return "x".join(str(size) for size in (*self.grid, self.x.shape[-1]))

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of the module's window (IPSA) or patch (CPSA)."""
        assert isinstance(self.module, InnerPatchAttention | CrossPatchAttention)
        module = self.module
        return module.window if isinstance(module, InnerPatchAttention) else module.patch

    def arguments(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The inputs in another dtype, and `batch` times."""

        def one(value: Any) -> Any:
            if isinstance(value, nn.Module):
                return copy.deepcopy(value).to(dtype)
            if not isinstance(value, Tensor):
                return value
            return value.to(dtype).expand(batch, *value.shape[1:]).contiguous()

        return tuple(map(one, self.inputs))

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


@torch.no_grad()
def capture(model: nn.Module, image: Tensor) -> tuple[list[Captured], Any]:
    """Run the model once; returns one of each operator in every stage, and its output.

    It is the first, but of digest attention, which then has no digests, the last. A stage is one of
    the feature maps that the model gives or, of a classifier, a size that operators see, from 1.
    """
    found: dict[tuple[str, int], Captured] = {}
    sizes: dict[tuple[int, int], int] = {}

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, CaBlock):
            x, grid, digests = inputs[:3]
            stage = sizes.setdefault(grid, len(sizes) + 1)
            alone = attention_of(module, grid, digests)
            entered = (module.norm1(x), digests)
            found["digest", stage] = Captured("digest", stage, alone, entered, grid)
            return
        assert isinstance(module, Operator)
        grid = _grid(module, inputs)
        operator, stage = OPERATORS[type(module)], sizes.setdefault(grid, len(sizes) + 1)
        if (operator, stage) not in found:
            kept = tuple(v.clone() if isinstance(v, Tensor) else v for v in inputs)
            found[operator, stage] = Captured(operator, stage, module, kept, grid)

    hooks = [
        module.register_forward_pre_hook(remember)
        for module in model.modules()
        if isinstance(module, Operator | CaBlock)
    ]
    try:
        output = model(image)
    finally:
        for handle in hooks:
            handle.remove()
    maps = output if isinstance(output, list | tuple) else ()
    stages = {tuple(y.shape[2:]): stage for stage, y in enumerate(maps, start=1)}
    staged = [replace(one, stage=stages.get(one.grid, one.stage)) for one in found.values()]
    order = list(OPERATORS.values())
    return sorted(staged, key=lambda one: (order.index(one.operator), one.stage)), output


def _grid(module: Operator, inputs: tuple[Any, ...]) -> tuple[int, int]:
    """Rows and columns of the map that a module is called on; the photo is square."""
    if isinstance(module, ClsCrossAttention):
        side = math.isqrt(inputs[1].shape[1])
        return side, side
    return inputs[0].shape[1:3] if inputs[0].dim() == 4 else inputs[1]


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


class _Called(nn.Module):
    """A module with its inputs given, whatever comes: for the counter, which passes one tensor."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*self.inputs)


@torch.no_grad()
def measure(captured: Captured, batch: int, budget: float) -> Measured:
    """Compare one module with its reference formulation, in float64 and in eager float32.

    Eager is what a user would have: the equation and F.linear.
    """
    module = captured.module
    eager = reference_of(module)
    exact = reference_of(module).double()(*captured.arguments(dtype=torch.float64))
    one, several = captured.arguments(), captured.arguments(batch)

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
        counted_macs=flops.count(_Called(module, one), captured.x.shape)[""],
        fused=timings["fused"],
        eager=timings["eager"],
    )


def formula(captured: Captured) -> int:
    """MACs by the papers' formulas: CAT's eq. 2 and 3, CoaT's 12, CabViT's 1 to 4, CrossViT's 6."""
    module, channels = captured.module, captured.x.shape[-1]
    if isinstance(module, InnerPatchAttention):
        return flops.ipsa(*captured.grid, channels, captured.window)
    if isinstance(module, CrossPatchAttention):
        return flops.cpsa(*captured.grid, channels, captured.window)
    height, width = captured.grid
    if isinstance(module, DigestAttention):
        return flops.digest(captured.x.shape[1], channels, module.num_digests)
    if isinstance(module, ClsCrossAttention):
        return flops.cls_cross(captured.x.shape[1], channels)
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
