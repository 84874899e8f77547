"""Each operator on the photo's own activations: right, how much work, how fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xattn_ops import CrossPatchAttention, InnerPatchAttention, flops
from xattn_ops.benchmarks.baselines import plain_linears
from xattn_ops.benchmarks.runner import Check, compare
from xattn_ops.benchmarks.timing import Timing, interleaved
from xattn_ops.demo.attention import cross_patch_weights, inner_patch_weights

Attention = InnerPatchAttention | CrossPatchAttention


@dataclass(frozen=True)
class Captured:
    """One attention module of a model and what entered it: x [1, H, W, C]."""

    operator: str
    stage: int
    module: Attention
    x: Tensor

    @property
    def shape(self) -> str:
        return "x".join(str(size) for size in self.x.shape[1:])

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of the module's window (IPSA) or patch (CPSA)."""
        module = self.module
        return module.window if isinstance(module, InnerPatchAttention) else module.patch

    def weights(self) -> Tensor:
        """The module's attention weights on x: see `attention`."""
        if isinstance(self.module, InnerPatchAttention):
            return inner_patch_weights(self.module, self.x)
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
def capture(model: nn.Module, image: Tensor) -> tuple[list[Captured], object]:
    """Run the model once; returns the first IPSA and CPSA of every stage, and the model's output.

    A stage is a new feature-map size, counted from 1.
    """
    found: dict[tuple[str, int], Captured] = {}
    sizes: dict[torch.Size, int] = {}

    def remember(module: Attention) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        operator = "ipsa" if isinstance(module, InnerPatchAttention) else "cpsa"

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            stage = sizes.setdefault(x.shape, len(sizes) + 1)
            found.setdefault((operator, stage), Captured(operator, stage, module, x.clone()))

        return hook

    hooks = [
        module.register_forward_pre_hook(remember(module))
        for module in model.modules()
        if isinstance(module, Attention)
    ]
    try:
        output = model(image)
    finally:
        for handle in hooks:
            handle.remove()
    return [found[key] for key in sorted(found, key=lambda key: (key[0] != "ipsa", key[1]))], output


@torch.no_grad()
def measure(captured: Captured, batch: int, budget: float) -> Measured:
    """Compare one module with its reference formulation, in float64 and in eager float32.

    Eager is what a user would have: the equation and F.linear.
    """
    module, x = captured.module, captured.x
    eager = reference_of(module)
    exact = reference_of(module).double()(x.double())
    copies = x.expand(batch, -1, -1, -1).contiguous()

    def run_eager(x: Tensor) -> Tensor:
        with plain_linears():
            return eager(x)

    fused_out, eager_out = module(x), run_eager(x)
    timings = interleaved(
        {"fused": lambda: module(copies), "eager": lambda: run_eager(copies)}, budget=budget
    )
    return Measured(
        captured=captured,
        check=compare([fused_out], [eager_out], [exact]),
        magnitude=exact.abs().mean().item(),
        formula_macs=formula(captured),
        counted_macs=flops.count(module, x.shape)[""],
        fused=timings["fused"],
        eager=timings["eager"],
    )


def formula(captured: Captured) -> int:
    """MACs by the paper's equation 2 or 3."""
    _, height, width, channels = captured.x.shape
    closed_form = flops.ipsa if captured.operator == "ipsa" else flops.cpsa
    return closed_form(height, width, channels, captured.window)


def reference_of(module: Attention) -> Attention:
    """A copy of the module that computes the equation in plain PyTorch."""
    twin = copy.deepcopy(module)
    twin.backend = "reference"
    return twin.eval()
