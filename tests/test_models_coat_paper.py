"""What the paper says of CoaT: the figures of its tables, co-scale, CLS attention maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.cases import backends
from support.models import on_meta, small_coat
from torch import Tensor, nn

from xattn_ops import flops
from xattn_ops.models.coat import cls_attention
from xattn_ops.models.coat_blocks import ParallelBlock, add_interpolated, cross_layer_attention

# ---- The paper's tables -------------------------------------------------------------------------

NO_RELATIVE = {"conv_relative": False}
CELLS = [  # model, options, millions of parameters and GMACs as printed; None: see DIFFERENT
    pytest.param("coat_lite_tiny", {}, "5.7", "1.6", id="tables 1, 2, 5, 6: Lite Tiny"),
    pytest.param("coat_lite_mini", {}, "11", "2.0", id="tables 1, 2, 6: Lite Mini"),
    pytest.param("coat_lite_small", {}, "20", None, id="tables 1, 2, 6: Lite Small"),
    pytest.param("coat_tiny", {}, "5.5", None, id="tables 1, 2, 6, 7: Tiny"),
    pytest.param("coat_mini", {}, "10", "6.8", id="tables 1, 2, 6: Mini"),
    pytest.param("coat_lite_tiny", NO_RELATIVE, None, "1.6", id="table 6: Lite Tiny w/o relative"),
    pytest.param("coat_lite_mini", NO_RELATIVE, "11", None, id="table 6: Lite Mini w/o relative"),
    pytest.param(
        "coat_lite_small", NO_RELATIVE, None, "3.9", id="table 6: Lite Small w/o relative"
    ),
    pytest.param("coat_tiny", NO_RELATIVE, "5.5", "4.3", id="table 6: Tiny w/o relative"),
    pytest.param("coat_mini", NO_RELATIVE, "10", "6.7", id="table 6: Mini w/o relative"),
    pytest.param("coat_tiny", {"co_scale": "none"}, "5.5", None, id="table 7: w/o co-scale"),
    pytest.param("coat_tiny", {"co_scale": "direct"}, "5.5", None, id="table 7: direct"),
]


def figures(name: str, options: dict) -> tuple[float, float]:
    """Millions of parameters, and GMACs at 224 x 224 (products and convolutions)."""
    model = on_meta(name, backend="reference", **options)
    count = sum(p.numel() for p in model.parameters())
    return count / 1e6, flops.count(model, (1, 3, 224, 224))[""] / 1e9


@pytest.mark.parametrize(("name", "options", "params", "gmacs"), CELLS)
def test_cells_of_the_paper_s_tables(name, options, params, gmacs):
    counted_params, counted_gmacs = figures(name, options)
    if params is not None:
        assert f"{counted_params:.2g}" == params
    if gmacs is not None:
        assert f"{counted_gmacs:.1f}" == gmacs


@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        pytest.param("coat_lite_tiny", NO_RELATIVE, 5.6, id="Lite Tiny: 5.699"),
        pytest.param("coat_lite_small", NO_RELATIVE, 19, id="Lite Small: 19.81"),
    ],
)
def test_parameters_that_the_paper_cuts_off(name, options, params):
    """Two cells of table 6 are the counts with their last digits cut off, where others round."""
    digits = 10 if params < 10 else 1
    assert math.floor(figures(name, options)[0] * digits) / digits == params


DIFFERENT = [  # model, options, GMACs printed, counted, and with 5 for each LayerNorm element
    pytest.param("coat_lite_small", {}, 4.0, 3.944, 3.960, id="tables 2, 6: Lite Small"),
    pytest.param(
        "coat_lite_mini", NO_RELATIVE, 1.9, 1.964, 1.973, id="table 6: Lite Mini w/o rel."
    ),
    pytest.param("coat_tiny", {}, 4.4, 4.316, 4.342, id="tables 2, 6, 7: Tiny"),
    pytest.param("coat_tiny", {"co_scale": "none"}, 4.4, 4.316, 4.342, id="table 7: w/o co-scale"),
    pytest.param("coat_tiny", {"co_scale": "direct"}, 4.8, 4.730, 4.756, id="table 7: direct"),
]


@pytest.mark.parametrize(("name", "options", "printed", "counted", "with_norms"), DIFFERENT)
def test_macs_that_differ_from_the_paper_s(name, options, printed, counted, with_norms):
    """Ours are the official code's products and convolutions; the paper's hold elementwise terms.

    With 5 for each element of a LayerNorm, as a common counter has it, Lite Small and direct
    cross-layer attention print as in the paper. CoaT Tiny misses its 4.4 by 0.01 then; what else
    the paper counts it does not say. Its 1.9 of Lite Mini is cut off.
    """
    model, normalised = on_meta(name, backend="reference", **options), 0

    def add(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal normalised
        normalised += output.numel()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(add)
    macs = flops.count(model, (1, 3, 224, 224))[""]
    assert macs / 1e9 == pytest.approx(counted, abs=5e-4)
    assert (macs + 5 * normalised) / 1e9 == pytest.approx(with_norms, abs=5e-4)
    assert abs(macs / 1e9 - printed) < 0.09


def test_position_encodings_of_table_5():
    """The table gives accuracies alone; each encoding is worth its kernels, 9 and 30 on average."""
    channels = 64 + 128 + 256 + 320
    none = figures("coat_lite_tiny", {"conv_position": False, "conv_relative": False})[0]
    position = figures("coat_lite_tiny", NO_RELATIVE)[0]
    relative = figures("coat_lite_tiny", {"conv_position": False})[0]
    assert (position - none) * 1e6 == pytest.approx(channels * (9 + 1))
    assert (relative - none) * 1e6 == pytest.approx(channels * (30 + 1))


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
