"""What the paper says of CoaT: the figures of its tables, co-scale, CLS attention maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.cases import backends
from support.models import small_coat
from torch import Tensor

from xattn_ops.models.coat import cls_attention
from xattn_ops.models.coat_blocks import ParallelBlock, add_interpolated, cross_layer_attention
from xattn_ops.papers import measure
from xattn_ops.papers.coat import PAPER

# ---- The paper's tables, whose cells are in xattn_ops.papers.coat and tests/test_papers.py -------


def test_position_encodings_of_table_5():
    """The table gives accuracies alone; each encoding is worth its kernels, 9 and 30 on average."""
    channels = 64 + 128 + 256 + 320
    rows = [row for row in PAPER.rows if row.table == "5"]
    none, relative, position, both = (measure(row).params for row in rows)
    assert position - none == channels * (9 + 1)
    assert relative - none == channels * (30 + 1)
    assert both - position == relative - none


# ---- Co-scale -----------------------------------------------------------------------------------

GRIDS = [(8, 12), (4, 6), (2, 3)]


def scales(channels: int = 16) -> list[Tensor]:
    return [torch.randn(2, 1 + h * w, channels, dtype=torch.float64) for h, w in GRIDS]


def resized(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens on another grid, the plain way."""
    cls, picture = x[:, :1], x[:, 1:].transpose(1, 2).unflatten(2, grid)
    picture = F.interpolate(picture, size, mode="bilinear", align_corners=False)
    return torch.cat([cls, picture.flatten(2).transpose(1, 2)], 1)


def test_interpolation_adds_the_resized_scales():
    xs = scales()
    for y, size in zip(add_interpolated(xs, GRIDS), GRIDS, strict=True):
        expected = sum(resized(x, grid, size) for x, grid in zip(xs, GRIDS, strict=True))
        torch.testing.assert_close(y, expected)


@backends
@pytest.mark.parametrize("conv_relative", [True, False])
def test_direct_attention_attends_to_the_resized_scales(conv_relative, backend):
    """Each term is a conv-attention whose keys and values are another scale's."""
    model = small_coat(1, co_scale="direct", conv_relative=conv_relative, backend=backend).double()
    attentions = [model.attentions(stage)[-1][1] for stage in (2, 3, 4)]
    xs = scales()
    got = cross_layer_attention(attentions, xs, GRIDS)
    for y, x, attention, size in zip(got, xs, attentions, GRIDS, strict=True):
        expected = 0
        for other, its, grid in zip(xs, attentions, GRIDS, strict=True):
            q, _, _ = attention.qkv(x).chunk(3, -1)
            _, k, v = (resized(part, grid, size) for part in its.qkv(other).chunk(3, -1))
            expected = expected + attention.proj(plain_attention(attention, q, k, v, size))
        torch.testing.assert_close(y, expected)


def plain_attention(attention, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """Equation 12 of 8 heads, written out."""
    heads = [
        (a @ (b.softmax(1).mT @ c)) * a.shape[-1] ** -0.5
        for a, b, c in zip(*(t.chunk(8, -1) for t in (q, k, v)), strict=True)
    ]
    out = torch.cat(heads, -1)
    if attention.crpe is None:
        return out
    picture = v[:, 1:].mT.unflatten(-1, grid)
    convs = attention.crpe.conv_list
    parts = picture.split([conv.in_channels for conv in convs], 1)
    encoded = torch.cat([conv(part) for conv, part in zip(convs, parts, strict=True)], 1)
    return out + F.pad(q[:, 1:] * encoded.flatten(2).mT, (0, 0, 1, 0))


@pytest.mark.parametrize(
    ("co_scale", "mixes"), [("none", False), ("direct", True), ("interpolation", True)]
)
def test_scales_meet_in_the_parallel_group_alone(co_scale, mixes):
    torch.manual_seed(1)
    model = small_coat(1, co_scale=co_scale).double()
    block: ParallelBlock = model.parallel_blocks[0]
    xs = [x.requires_grad_() for x in scales()]
    y = block(xs, GRIDS, [model.cpe2, model.cpe3, model.cpe4])[0]
    grads = torch.autograd.grad(y.square().sum(), xs, allow_unused=True)
    assert [grad is not None for grad in grads] == [True, mixes, mixes]


# ---- CLS attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "stage", "block"),
    [(0, 1, 0), (0, 4, -1), (2, 1, -1), (2, 2, 0), (2, 3, 1), (2, 4, -1)],
)
def test_cls_attention_times_v_is_what_the_block_gives_cls(depth, stage, block):
    model = small_coat(depth).double().eval()
    x, seen = torch.randn(2, 3, 64, 96).double(), []
    norm, attention = model.attentions(stage)[block]
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    rows = cls_attention(model, x, stage, block)
    side = (64 // (2 * 2**stage), 96 // (2 * 2**stage))
    assert list(rows.shape) == [2, 8, *side]

    q, k, v = (t.unflatten(-1, (8, -1)) for t in attention.qkv(seen[0]).chunk(3, -1))
    weights = torch.einsum("bhd,bnhd->bhn", q[:, 0], k.softmax(1)) * q.shape[-1] ** -0.5
    torch.testing.assert_close(rows.flatten(2), weights[..., 1:])
    out = attention(seen[0], side)[:, 0]
    torch.testing.assert_close(
        attention.proj(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)), out
    )


def test_cls_attention_leaves_the_model_as_it_was():
    model = small_coat()
    cls_attention(model, torch.randn(1, 3, 64, 64), 2)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"image is"):
        cls_attention(model, torch.randn(3, 64, 64), 2)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("stage", "block", "message"),
    [
        (0, 0, "stage is 0; it must be 1, 2, 3 or 4"),
        (5, 0, "stage is 5"),
        (1, 1, "block is 1; stage 1 has 1 blocks"),
        (2, 3, "block is 3; stage 2 has 3 blocks"),
        (2, -4, "block is -4"),
    ],
)
def test_cls_attention_of_blocks_that_are_not_there(stage, block, message):
    with pytest.raises(ValueError, match=message):
        cls_attention(small_coat(), torch.randn(1, 3, 64, 64), stage, block)
