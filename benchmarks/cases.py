"""What is timed: the operators at the shapes of CAT-S, whole blocks and whole models.

A case holds one problem in several variants that take the same operands: ours, the plain
formulations of `baselines`, and the plain one in float64 that says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xattn_ops import (
    CrossPatchAttention,
    InnerPatchAttention,
    cross_patch_attention,
    flops,
    inner_patch_attention,
)
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.baselines import Plain
from xattn_ops.benchmarks.options import DIRECTIONS
from xattn_ops.models import create_model, list_models
from xattn_ops.models.cat import Block

FORWARD, STEP = DIRECTIONS


@dataclass(frozen=True)
class Stage:
    """Feature map of one stage of a model, and the window (IPSA) or patch (CPSA) on it."""

    height: int
    width: int
    channels: int
    heads: int
    window: tuple[int, int] = (7, 7)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}"


CAT_SMALL = (
    Stage(56, 56, 96, 3),
    Stage(28, 28, 192, 6),
    Stage(14, 14, 384, 12),
    Stage(7, 7, 768, 24),
)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. Leaves correspond, in order, between the variants of a case."""

    function: Plain
    arguments: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def forward(self) -> Tensor:
        with torch.no_grad(), self.within():
            return self.function(*self.arguments)

    def step(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Output and the gradient of every leaf."""
        with self.within():
            out = self.function(*self.arguments)
            return (out.detach(), *torch.autograd.grad(out, self.leaves, grad))

    def compiled(self) -> Variant:
        return replace(self, function=baselines.compiled(self.function))


@dataclass(frozen=True)
class Case:
    """One row of the benchmark before it is measured."""

    operator: str
    shape: str
    batch: int
    dtype: torch.dtype
    direction: str
    ours: dict[str, Variant]  # the first is the row itself
    plain: dict[str, Variant]  # the first, "eager", sets the tolerance
    oracle: Variant  # float64
    macs: int  # of the paper's algorithm, forward, whole batch
    dense_bytes: int  # what an attention matrix of all units would take; 0 where it makes no sense

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape} B={self.batch}"


def ipsa_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """The attention itself: qkv and table in, [B, H, W, C] out."""
    make = _Maker(dtype, direction)
    qkv = make(batch, stage.height, stage.width, 3 * stage.channels)
    table = make(*_table_shape(stage))

    def fused(qkv: Tensor, table: Tensor) -> Tensor:
        return inner_patch_attention(qkv, table, num_heads=stage.heads, window=stage.window)

    attention = flops.ipsa(stage.height, stage.width, stage.channels, stage.window)
    linears = 4 * stage.height * stage.width * stage.channels**2
    return Case(
        operator="ipsa",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, (qkv, table), (qkv, table))},
        plain=_ipsa_baselines(stage, direction, (qkv,), table, lambda core: core, flex=True),
        oracle=_oracle(_table_ipsa(stage), (qkv, table)),
        macs=batch * (attention - linears),
        dense_bytes=_dense_bytes(stage, batch, dtype),
    )


def ipsa_module_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """InnerPatchAttention with its two linears."""
    make = _Maker(dtype, direction)
    x = make(batch, stage.height, stage.width, stage.channels)
    module = InnerPatchAttention(stage.channels, stage.heads, stage.window).to(dtype)
    with torch.no_grad():  # a fresh table is near zero: make the bias matter to the check
        module.relative_position_bias_table.copy_(make(*_table_shape(stage)))
    module.train(direction == STEP)
    linears = (module.qkv.weight, module.qkv.bias, module.proj.weight, module.proj.bias)
    table = module.relative_position_bias_table
    operands = (x, *linears, table)
    plain = _ipsa_baselines(stage, direction, (x, *linears), table, baselines.with_linears)
    return Case(
        operator="ipsa_module",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(module, (x,), operands)},
        plain=plain,
        oracle=_oracle(baselines.with_linears(_table_ipsa(stage)), operands),
        macs=batch * flops.ipsa(stage.height, stage.width, stage.channels, stage.window),
        dense_bytes=_dense_bytes(stage, batch, dtype),
    )


def cpsa_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """Cross-patch attention, projections included."""
    make = _Maker(dtype, direction)
    patch = stage.window
    length = patch[0] * patch[1]
    operands = (
        make(batch, stage.height, stage.width, stage.channels),
        make(3 * length, length, scale=length**-0.5),
        make(3 * length, scale=0.1),
        make(length, length, scale=length**-0.5),
        make(length, scale=0.1),
    )

    def fused(x: Tensor, *weights: Tensor) -> Tensor:
        return cross_patch_attention(x, *weights, patch=patch)

    eager = baselines.cpsa(baselines.attend_eager, patch)
    sdpa = baselines.cpsa(baselines.attend_sdpa, patch)
    tokens = (stage.height // patch[0]) * (stage.width // patch[1])
    return Case(
        operator="cpsa",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain={
            "eager": Variant(eager, operands, operands),
            "sdpa": Variant(sdpa, operands, operands),
            "compile": Variant(eager, operands, operands).compiled(),
        },
        oracle=_oracle(eager, operands),
        macs=batch * flops.cpsa(stage.height, stage.width, stage.channels, patch),
        dense_bytes=batch * stage.channels * tokens**2 * dtype.itemsize,
    )


def cab_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A whole cross-attention block: IPSA, CPSA, IPSA, each with its norms and MLP."""
    width, window = stage.channels, stage.window
    torch.manual_seed(0)
    block = nn.Sequential(
        Block(width, InnerPatchAttention(width, stage.heads, window), 4.0, 0.0),
        Block(width, CrossPatchAttention(window), 4.0, 0.0),
        Block(width, InnerPatchAttention(width, stage.heads, window), 4.0, 0.0),
    )
    x = _Maker(dtype, direction)(batch, stage.height, stage.width, width)
    return _module_case("cab", str(stage), block, x, direction)


def model_case(name: str, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A whole classifier at its own image size, without stochastic depth."""
    check_model(name)
    torch.manual_seed(0)
    model = create_model(name, drop_path=0.0)
    image = _Maker(dtype, FORWARD)(batch, 3, 224, 224)
    return _module_case(name, "224x224", model, image, direction)


def check_model(name: str) -> None:
    """Raise ValueError unless there is such a model."""
    if name not in list_models():
        raise ValueError(f"no model {name!r}; there are {', '.join(list_models())}")


def _module_case(operator: str, shape: str, module: nn.Module, x: Tensor, direction: str) -> Case:
    """Ours as it is and compiled, against the official formulation as it is and compiled."""
    module.to(x.dtype).train(direction == STEP)
    plain = baselines.plain_copy(module)
    exact = baselines.plain_copy(module).double()

    def variant(module: nn.Module, x: Tensor) -> Variant:
        weights = tuple(p for _, p in sorted(module.named_parameters()))
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
    )


BUILDERS: dict[str, Callable[[Stage, int, torch.dtype, str], Case]] = {
    "ipsa": ipsa_case,
    "ipsa_module": ipsa_module_case,
    "cpsa": cpsa_case,
    "cab": cab_case,
}
OPERATORS = {"ipsa": ("ipsa", "ipsa_module"), "cpsa": ("cpsa",)}  # bench argument -> cases


def build(operator: str, stage: int, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """The case of one stage of CAT-S (see `BUILDERS`), or of a model, which has no stage."""
    if operator in BUILDERS:
        return BUILDERS[operator](CAT_SMALL[stage], batch, dtype, direction)
    return model_case(operator, batch, dtype, direction)


class _Maker:
    """Reproducible normal operands; for a step they require gradients."""

    def __init__(self, dtype: torch.dtype, direction: str) -> None:
        self.dtype = dtype
        self.requires_grad = direction == STEP
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.dtype).requires_grad_(self.requires_grad)


def _ipsa_baselines(
    stage: Stage,
    direction: str,
    operands: tuple[Tensor, ...],
    table: Tensor,
    wrap: Callable[[Plain], Plain],
    *,
    flex: bool = False,
) -> dict[str, Variant]:
    """Forward: on a bias gathered beforehand, as a careful user would. A step: from the table."""
    if direction == FORWARD:
        index = baselines.relative_index(*stage.window)
        last = baselines.gather_bias(table.detach(), index).contiguous()
        formulation = baselines.ipsa_dense
    else:
        last, formulation = table, baselines.ipsa_table
    operands = (*operands, last)

    def variant(make_core: Callable[[Tensor], baselines.Core]) -> Variant:
        function = wrap(formulation(make_core, stage.heads, stage.window))
        return Variant(function, operands, operands)

    plain = {
        "eager": variant(baselines.eager_core),
        "sdpa": variant(baselines.sdpa_core),
        "compile": variant(baselines.eager_core).compiled(),
    }
    if flex and direction == FORWARD:
        plain["flex"] = variant(baselines.flex_core).compiled()
    return plain


def _table_ipsa(stage: Stage) -> Plain:
    return baselines.ipsa_table(baselines.eager_core, stage.heads, stage.window)


def _table_shape(stage: Stage) -> tuple[int, int]:
    rows, columns = stage.window
    return (2 * rows - 1) * (2 * columns - 1), stage.heads


def _dense_bytes(stage: Stage, batch: int, dtype: torch.dtype) -> int:
    tokens = stage.window[0] * stage.window[1]
    units = batch * (stage.height * stage.width // tokens) * stage.heads
    return units * tokens**2 * dtype.itemsize


def _oracle(function: Plain, operands: tuple[Tensor, ...]) -> Variant:
    exact = tuple(t.detach().double().requires_grad_() for t in operands)
    return Variant(function, exact, exact)
