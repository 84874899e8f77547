"""What the demo shows: the attention maps of each operator and where it finds them."""

import pytest
import torch

from xattn_ops import CrossPatchAttention, InnerPatchAttention
from xattn_ops.demo import measure
from xattn_ops.demo.attention import cross_patch_weights, inner_patch_weights
from xattn_ops.demo.command import load_model


@pytest.mark.parametrize(
    ("height", "width"), [pytest.param(6, 10, id="whole"), pytest.param(7, 8, id="padded")]
)
def test_ipsa_maps_are_the_weights_of_the_module(height, width):
    """The drawn weights times v, projected, are the module's output."""
    module = InnerPatchAttention(8, 2, (3, 5)).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, height, width, 8).double()
    weights = inner_patch_weights(module, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    rows, columns = weights.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, 0, 5 * columns - width, 0, 3 * rows - height))
    v = module.qkv(padded)[..., 16:].view(2, rows, 3, columns, 5, 2, 4)
    v = v.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)  # [B, gh, gw, heads, N, D]
    out = (weights @ v).unflatten(4, (3, 5)).permute(0, 1, 4, 2, 5, 3, 6)
    out = module.proj(out.reshape(2, 3 * rows, 5 * columns, 8))[:, :height, :width]
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize(
    ("height", "width"), [pytest.param(6, 8, id="whole"), pytest.param(5, 7, id="padded")]
)
def test_cpsa_maps_are_the_weights_of_the_module(height, width):
    module = CrossPatchAttention((3, 4)).double()
    x = torch.randn(2, height, width, 3).double()
    weights = cross_patch_weights(module, x)  # [B, C, T, T]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 8 - width, 0, 6 - height))
    tokens = padded.view(2, 2, 3, 2, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4, 12)
    out = module.proj(weights @ module.qkv(tokens)[..., 24:]).view(2, 3, 2, 2, 3, 4)
    out = out.permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 8, 3)[:, :height, :width]
    torch.testing.assert_close(out, module(x))


def test_maps_of_several_heads_are_their_mean():
    module = CrossPatchAttention((2, 2), num_heads=2)
    weights = cross_patch_weights(module, torch.randn(1, 4, 4, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 4))


def test_maps_of_shifted_windows_are_refused():
    module = InnerPatchAttention(8, 2, (4, 4), shift=(2, 2))
    with pytest.raises(ValueError, match="without a shift"):
        inner_patch_weights(module, torch.zeros(1, 8, 8, 8))


def test_capture_finds_the_first_of_each_operator_in_every_stage():
    model = load_model("cat_tiny", None)
    captured, features = measure.capture(model, torch.zeros(1, 3, 64, 64))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    shapes = ["16x16x64", "8x8x128", "4x4x256", "2x2x512"]
    expected = [(o, i, s) for o in ("ipsa", "cpsa") for i, s in enumerate(shapes, start=1)]
    assert found == expected
    assert len(features) == 4
    assert captured[0].module is model.layers[0].pre_ipsa_blocks[0].attn
    assert not captured[0].module._forward_pre_hooks


def test_capture_finds_coats_operators_on_their_grids():
    model = load_model("coat_tiny", None)
    captured, _ = measure.capture(model, torch.zeros(1, 3, 64, 96))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    shapes = ["16x24x152", "8x12x152", "4x6x152", "2x3x152"]
    expected = [(o, i, s) for o in ("convrel", "convpos") for i, s in enumerate(shapes, start=1)]
    assert found == expected
    assert captured[0].module is model.serial_blocks1[0].factoratt_crpe
    assert captured[0].x.shape == (1, 1 + 16 * 24, 152)
    assert not captured[0].module._forward_pre_hooks


def test_capture_finds_crossvits_operators_on_the_grid_that_they_look_at():
    model = load_model("crossvit_9", None)
    captured, _ = measure.capture(model, torch.zeros(1, 3, 64, 64))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    assert found == [("clsattn", 1, "4x4x256"), ("clsattn", 2, "5x5x128")]
    assert captured[0].module is model.blocks[0].fusion[0].attn
    cls, patches, norm = captured[0].inputs
    assert (cls.shape, patches.shape) == ((1, 1, 256), (1, 16, 256))
    assert norm is model.blocks[0].fusion[0].norm1
    exact = captured[0].arguments(3, torch.float64)
    assert (exact[0].shape, exact[1].dtype, exact[2].weight.dtype) == (
        (3, 1, 256), torch.float64, torch.float64
    )  # fmt: skip
    assert norm.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["cat_tiny", "coat_lite_tiny", "crossvit_9", "cabvit_h_l1"])
def test_the_papers_macs_are_those_counted(name):
    captured, _ = measure.capture(load_model(name, None), torch.zeros(1, 3, 64, 64))
    measured = [measure.measure(one, 1, 0.0) for one in captured]
    formulas = [(one.captured.operator, one.formula_macs) for one in measured]
    counted = [(one.captured.operator, one.counted_macs) for one in measured]
    assert formulas == counted


def test_capture_finds_the_last_digest_attention_of_every_stage_with_its_tables():
    model, image = load_model("cabvit_h_l1", None), torch.randn(1, 3, 96, 64)
    captured, _ = measure.capture(model, image)
    assert [(one.operator, one.stage, one.shape) for one in captured] == [
        ("digest", 3, "6x4x192"),
        ("digest", 4, "3x2x320"),
    ]
    block = model.cab_blocks(3)[-1]
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(image)
    x, grid, digests = seen[0]
    one = captured[0]
    assert one.module.num_digests == digests.shape[1] == 5 * 2
    expected = block.proj(block.attend(block.norm1(x), digests, block.tables_on(grid)))
    torch.testing.assert_close(one.module(*one.arguments()), expected)
