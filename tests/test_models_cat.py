"""What is particular to CAT: its patches and windows, its embeddings, its rates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import on_meta, small_cat
from torch import Tensor

from xattn_ops.models import create_model
from xattn_ops.models.cat import CAT

# ---- Sizes --------------------------------------------------------------------------------------


def test_patch_shrinks_with_the_stage():
    model = create_model("cat_tiny", img_size=(96, 160))  # stages 24x40, 12x20, 6x10, 3x5
    windows = [layer.pre_ipsa_blocks[0].attn.window for layer in model.layers]
    assert windows == [(7, 7), (7, 7), (6, 6), (3, 3)]
    assert [layer.cpsa_blocks[0].attn.patch for layer in model.layers] == windows
    backbone = create_model("cat_tiny", img_size=(96, 160), features_only=True)
    assert {layer.cpsa_blocks[0].attn.patch for layer in backbone.layers} == {(7, 7)}


def test_image_padding_is_zeros_to_the_right_and_bottom():
    model = small_cat(features_only=True).eval()
    x = torch.randn(1, 3, 50, 53)
    for a, b in zip(model(x), model(F.pad(x, (0, 3, 0, 2))), strict=True):
        assert torch.equal(a, b)


# ---- Options ------------------------------------------------------------------------------------


def test_options_reach_the_layers():
    shifted = small_cat(shift=True)
    assert shifted.layers[0].pre_ipsa_blocks[0].attn.shift == (0, 0)
    assert shifted.layers[0].post_ipsa_blocks[1].attn.shift == (3, 3)
    assert shifted.layers[1].post_ipsa_blocks[0].attn.shift == (0, 0)  # one 7x7 window
    assert small_cat(cpsa_heads="patch").layers[0].cpsa_blocks[0].attn.num_heads == 7
    assert small_cat(ape=False).ape is None
    attn = small_cat(attn_drop=0.2).layers[0]
    assert attn.cpsa_blocks[0].attn.attn_drop == attn.pre_ipsa_blocks[0].attn.attn_drop == 0.2
    no_head = small_cat(num_classes=0).eval()
    assert no_head(torch.randn(1, 3, 56, 56)).shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "rate"), [("cat_tiny", 0.1), ("cat_small", 0.2), ("cat_base", 0.3)]
)
def test_drop_path_rates_grow_linearly(name, rate):
    model = on_meta(name)
    blocks = [b for layer in model.layers for b in layer.pre_ipsa_blocks]
    rates = [b.drop_path.rate for b in blocks]
    assert rates == pytest.approx([rate * i / (len(blocks) - 1) for i in range(len(blocks))])
    assert rates == [b.drop_path.rate for layer in model.layers for b in layer.cpsa_blocks]


def test_a_classifier_takes_its_own_size():
    with pytest.raises(ValueError, match="image is 56 x 60; this classifier takes 56 x 56"):
        small_cat()(torch.ones(1, 3, 56, 60))


def test_without_ape_a_classifier_takes_other_sizes():
    assert small_cat(ape=False)(torch.randn(1, 3, 61, 90)).shape == (1, 5)


def test_slice_orders_pixels_as_two_interleaves():
    image, dim = torch.randn(1, 3, 8, 12), 6
    embed = CAT(dim, (1,), (1,), patch_embed="slice", img_size=(8, 12)).patch_embed

    def halve(x: Tensor) -> Tensor:
        parts = [x[..., dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
        return torch.cat(parts, 1)

    expected = embed.norm(embed.proj(halve(halve(image))).permute(0, 2, 3, 1))
    torch.testing.assert_close(embed(image), expected)
