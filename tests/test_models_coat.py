"""What is particular to CoaT: what it does with odd images, its norms, its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.families import COAT_FAMILY
from support.models import on_meta, small_coat

from xattn_ops.models.coat import CoaT
from xattn_ops.models.layers import Mlp

families = pytest.mark.parametrize("depth", [0, 2], ids=["lite", "coat"])


# ---- Sizes --------------------------------------------------------------------------------------


@families
def test_what_is_beyond_the_last_patch_is_left_out(depth):
    model, x = small_coat(depth, features_only=True).eval(), torch.randn(1, 3, 67, 98)
    for a, b in zip(model(x), model(x[..., :64, :96]), strict=True):
        assert torch.equal(a, b)


@families
def test_small_images_are_padded_to_the_right_and_bottom(depth):
    model, x = small_coat(depth).eval(), torch.randn(1, 3, 20, 40)
    assert torch.equal(model(x), model(F.pad(x, (0, 0, 0, 12))))


# ---- Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2])
def test_norms_that_no_head_reads_take_no_gradient(depth):
    """So that distributed training does not wait for them."""
    frozen = {key for key, p in small_coat(depth).named_parameters() if not p.requires_grad}
    unread = ["norm1", "norm2", "norm3"] if depth == 0 else ["norm1"]
    assert frozen == {f"{norm}.{kind}" for norm in unread for kind in ("weight", "bias")}


def test_options_reach_the_layers():
    model = small_coat(drop=0.1, drop_path=0.2, num_classes=0).eval()
    serial, parallel = model.serial_blocks2[0], model.parallel_blocks[1]
    assert serial.drop_path.rate == parallel.drop_path.rate == 0.2
    assert serial.mlp.drop == parallel.mlp3.drop == 0.1
    assert serial.factoratt_crpe.proj_drop == parallel.factoratt_crpe4.proj_drop == 0.1
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 16)
    assert small_coat(conv_position=False).cpe2 is None
    assert small_coat(conv_relative=False).serial_blocks1[0].factoratt_crpe.crpe is None


@pytest.mark.parametrize("name", COAT_FAMILY.names)
def test_the_paper_trains_without_dropout_or_stochastic_depth(name):
    model = on_meta(name)
    blocks = [b for s in range(1, 5) for b in getattr(model, f"serial_blocks{s}")]
    assert {b.drop_path.rate for b in [*blocks, *model.parallel_blocks]} == {0.0}
    assert {m.drop for m in model.modules() if isinstance(m, Mlp)} == {0.0}


def test_a_parallel_group_needs_equal_widths():
    with pytest.raises(ValueError, match=r"dims are \(8, 8, 8, 16\); those of scales 2 to 4 must"):
        CoaT((8, 8, 8, 16), (1, 1, 1, 1), (2, 2, 2, 2), 1)
