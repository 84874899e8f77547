"""The papers' closed forms at sizes of their models, beside what counters and kernels say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import (
    ClsCrossAttention,
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    DigestAttention,
    InnerPatchAttention,
    flops,
)
from xattn_ops.models.layers import Mlp

Module = Callable[[str | None], nn.Module]  # of a backend


@dataclass(frozen=True)
class Form:
    """One closed form at one size.

    name, source, formula: what it is, where the paper has it, and how it goes.
    shape: the size it is evaluated at.
    macs: its value.
    module: what is counted; None where the library has no operator for it.
    inputs: shapes of the module's tensors; grid: its grid argument, for modules of tokens.
    printed: the paper's own figure at this size, in GMACs.
    executed: MACs of our CPU kernel where it absorbs projections; None where it is the formula's.
    note: what else there is to say.
    """

    name: str
    source: str
    formula: str
    shape: str
    macs: int
    module: Module
    inputs: tuple[tuple[int, ...], ...]
    grid: tuple[int, int] | None = None
    printed: str | None = None
    executed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Counted:
    """A form and the counts of its operator: the registered formulas', and the reference's own."""

    form: Form
    counter: int
    reference: int

    @property
    def agrees(self) -> bool:
        return self.form.macs == self.counter == self.reference


def count(form: Form) -> Counted:
    """Run the form's module once under torch's counter, on our operator and on its reference."""
    return Counted(form, *(_count(form, backend) for backend in (None, "reference")))


def _count(form: Form, backend: str | None) -> int:
    tensors = [torch.zeros(shape) for shape in form.inputs]
    rest = () if form.grid is None else (form.grid,)
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        form.module(backend).eval()(*tensors, *rest)
    return mode.get_total_flops() // 2


class PlainAttention(nn.Module):
    """Attention over all tokens with its projections, as equation 1 of CAT counts it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, device="meta")
        self.proj = nn.Linear(dim, dim, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.to("meta")).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.mT, -1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


FORMS = (
    Form(
        "MSA",
        "CAT eq. 1",
        "4 HW C² + 2 (HW)² C",
        "56x56x96",
        flops.msa(56, 56, 96),
        lambda backend: PlainAttention(96, 3),
        ((1, 3136, 96),),
        printed="2.0",
    ),
    Form(
        "IPSA",
        "CAT eq. 2",
        "4 HW C² + 2 N² HW C",
        "56x56x96, N = 7",
        flops.ipsa(56, 56, 96, 7),
        lambda backend: InnerPatchAttention(96, 3, (7, 7), backend=backend),
        ((1, 56, 56, 96),),
        printed="0.15",
    ),
    Form(
        "IPSA, padded",
        "CAT eq. 2",
        "4 HW C² + 2 N² H'W' C",
        "60x60x96, N = 7",
        flops.ipsa(60, 60, 96, 7),
        lambda backend: InnerPatchAttention(96, 3, (7, 7), backend=backend),
        ((1, 60, 60, 96),),
        note="windows reach to 63x63; the projections of padding are not computed",
    ),
    Form(
        "CPSA",
        "CAT eq. 3",
        "4 N² HW C + 2 (HW/N)² C",
        "56x56x96, N = 7",
        flops.cpsa(56, 56, 96, 7),
        lambda backend: CrossPatchAttention((7, 7), backend=backend),
        ((1, 56, 56, 96),),
        printed="0.1",
        executed=flops.cpsa_absorbed(56, 56, 96, 7),
        note="two projections absorbed: 2 N² HW C + 2 (HW/N)² C + 2 N⁶ a call",
    ),
    Form(
        "conv-relative",
        "CoaT eq. 12",
        "4 N C² + 2 N C²/h + HW Σ C_g M_g²",
        "56x56x64, h = 8",
        flops.conv_relative(56, 56, 64),
        lambda backend: ConvRelativeAttention(64, 8, backend=backend),
        ((1, 3137, 64),),
        (56, 56),
        note="the paper gives O(NC²) (eq. 3) and O(NCM²) (eq. 10)",
    ),
    Form(
        "conv position",
        "CoaT 4.2",
        "HW C M²",
        "56x56x64, M = 3",
        flops.conv_position(56, 56, 64),
        lambda backend: ConvPositionEncoding(64, backend=backend),
        ((1, 3137, 64),),
        (56, 56),
    ),
    Form(
        "digest",
        "CabViT 3.3",
        "4 n d² + 2 n (n+m) d + 2 m d²",
        "n = 196, m = 80, d = 192",
        flops.digest(196, 192, 80),
        lambda backend: DigestAttention(192, 6, (14, 14), 80, backend=backend),
        ((1, 196, 192), (1, 80, 192)),
        note="block 6 of a stage, (l-1) n/s² = 80 digests; without them the MHA of Fig. 5",
    ),
    Form(
        "FFN",
        "CabViT Fig. 5",
        "8 n d²",
        "n = 196, d = 192",
        flops.ffn(196, 192),
        lambda backend: Mlp(192, 768),
        ((1, 196, 192),),
    ),
    Form(
        "CLS cross",
        "CrossViT eq. 6",
        "2 (N+2) C² + 2 (N+1) C",
        "N = 400, C = 192, h = 6",
        flops.cls_cross(400, 192),
        lambda backend: ClsCrossAttention(192, 6, backend=backend),
        ((1, 1, 192), (1, 400, 192)),
        executed=flops.cls_cross_absorbed(400, 192, 6),
        note="keys and values absorbed: 4 C² + 2 (N+1) C h",
    ),
)
