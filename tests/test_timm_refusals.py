"""What patch leaves to timm, and what it says: hooks, wrapped layers, other classes, no timm."""

from __future__ import annotations

import sys

import pytest
import torch
from support.timm import (
    assert_same_logits,
    contents,
    image_for,
    small,
    small_coat,
    small_crossvit,
    small_swin,
)
from support.timm import timm as timm_package
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn

import xattn_ops.integrations
from xattn_ops.integrations.timm import patch, unpatch

# ---- Hooks, and layers that others have wrapped ------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("crossvit", "blocks.0.fusion.0.attn", id="cls-attention"),
        pytest.param("crossvit", "blocks.0.fusion.0.norm1", id="cls-norm"),
        pytest.param("crossvit", "blocks.0.fusion.0.attn.proj", id="cls-proj"),
        pytest.param("coat", "serial_blocks2.0.factoratt_crpe", id="factorised"),
        pytest.param("coat", "serial_blocks2.0.factoratt_crpe.qkv", id="factorised-qkv"),
        pytest.param("coat", "cpe3", id="encoding"),
        pytest.param("swin", "layers.0.blocks.1.attn", id="window"),
        pytest.param("swin", "layers.0.blocks.1.attn.qkv", id="window-qkv"),
        pytest.param("swin", "layers.0.blocks.1.attn.proj", id="window-proj"),
    ],
)
@torch.no_grad()
def test_hooks_run(family, name):
    """One that changes the output changes the logits as it does in timm."""
    model = small(family).eval()
    model.get_submodule(name).register_forward_hook(lambda module, args, out: 1.5 * out)
    assert_same_logits(model, image_for(model))


def test_parametrised_layers_are_called():
    """As adapters and weight norms wrap them."""
    model = small("swin").eval()
    for block in model.layers[0].blocks:
        nn.utils.parametrizations.weight_norm(block.attn.qkv)
        nn.utils.parametrizations.weight_norm(block.attn.proj)
    assert_same_logits(model, image_for(model))


# ---- Refusals ------------------------------------------------------------------------------------


class OwnWindowAttention(WindowAttention):
    """A user's."""


class OwnBlock(SwinTransformerBlock):
    """A user's."""


def refused(model: nn.Module, name: str) -> str:
    """Why patch leaves that module, which then is still timm's and runs, and replaces others."""
    kinds = {n: type(m) for n, m in model.named_modules()}
    report = patch(model)
    assert list(report.refused) == [name]
    assert name not in report.replaced
    assert type(model.get_submodule(name)) is kinds[name]
    assert f"{name}: not replaced, {report.refused[name]}" in str(report).splitlines()
    assert unpatch(model) == list(report.replaced)
    return report.refused[name]


def test_a_derived_class_is_left_alone():
    model = small_swin()
    model.layers[0].blocks[1].attn.__class__ = OwnWindowAttention
    message = (
        "OwnWindowAttention derives from timm's WindowAttention and may compute something else"
    )
    assert refused(model, "layers.0.blocks.1.attn") == message


def test_a_derived_block_keeps_its_attention():
    model = small_swin()
    model.layers[0].blocks[1].__class__ = OwnBlock
    message = "no SwinTransformerBlock of timm is around it, to hand it the map"
    assert refused(model, "layers.0.blocks.1.attn") == message


def test_a_window_of_another_size_than_the_block_s():
    model = small_swin()
    model.layers[0].blocks[1].attn.set_window_size((2, 2))
    message = "its window (2, 2) is not its block's, (4, 4)"
    assert refused(model, "layers.0.blocks.1.attn") == message


def test_wrapped_layers_that_the_operator_would_pass_by():
    model = small_crossvit()
    model.blocks[0].fusion[1].attn.wk = nn.Sequential(model.blocks[0].fusion[1].attn.wk)
    message = "wk is a Sequential; a plain Linear is needed"
    assert refused(model, "blocks.0.fusion.1.attn") == message
    model = small_crossvit()
    model.blocks[1].fusion[0].attn.wv.register_forward_hook(lambda *args: None)
    message = "wv is a Linear with hooks; a plain Linear is needed"
    assert refused(model, "blocks.1.fusion.0.attn") == message
    model = small_swin()
    model.layers[1].blocks[0].attn.qkv = nn.Bilinear(2, 2, 2)
    message = "qkv is a Bilinear; a plain Linear is needed"
    assert refused(model, "layers.1.blocks.0.attn") == message


def test_convolutions_that_are_not_the_operator_s():
    model = small_coat(0)
    model.cpe2.proj = nn.Conv2d(16, 16, 4, padding=2, groups=16)
    message = "the kernel of proj is (4, 4); a square one of odd size is needed"
    assert refused(model, "cpe2") == message
    model = small_coat(0)
    model.cpe2.proj = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
    assert "a depthwise one that keeps the size of the map is needed" in refused(model, "cpe2")
    model = small_coat(0)
    model.cpe2.proj = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    assert refused(model, "cpe2").startswith("proj is Conv2d(16, 16, ")
    model = small_coat(0)
    model.crpe1.conv_list[1] = nn.Identity()
    message = "crpe.conv_list.1 is a Identity; a plain Conv2d is needed"
    assert refused(model, "serial_blocks1.0.factoratt_crpe") == message
    model = small_coat(0)
    model.serial_blocks1[0].factoratt_crpe.crpe = None
    message = "crpe is None; a ConvRelPosEnc is needed"
    assert refused(model, "serial_blocks1.0.factoratt_crpe") == message


def test_dropout_that_leaves_nothing():
    model = small_swin()
    model.layers[0].blocks[0].attn.attn_drop = nn.Dropout(1.0)
    message = "attn_drop drops with 1.0; less than 1 is needed"
    assert refused(model, "layers.0.blocks.0.attn") == message
    model = small_crossvit()
    model.blocks[0].fusion[0].attn.attn_drop = nn.AlphaDropout(0.1)
    message = "attn_drop is a AlphaDropout; a plain Dropout is needed"
    assert refused(model, "blocks.0.fusion.0.attn") == message


def test_a_custom_cls_block_keeps_its_norm_outside():
    """Only timm's own block is known to hand its norm on."""
    model = small("crossvit").eval()

    class Own(type(model.blocks[0].fusion[0])):
        pass

    model.blocks[0].fusion[0].__class__ = Own
    assert_same_logits(model, image_for(model))
    model.blocks[1].fusion[0].norm1 = nn.Identity()
    assert_same_logits(model, image_for(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(
            nn.Linear(2, 2),
            r"model is a Linear in which nothing can be replaced; allowed are timm's CrossVit, "
            r"CoaT and SwinTransformer$",
            id="nothing-of-timm",
        ),
        pytest.param(
            nn.Sequential(WindowAttention(8, 2)),
            r"SwinTransformer \(0: no SwinTransformerBlock of timm is around it",
            id="a-lone-attention",
        ),
    ],
)
def test_models_with_nothing_to_replace(model, message):
    with pytest.raises(ValueError, match=message):
        patch(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("swinv2_tiny_window8_256", "SwinTransformerV2 in which nothing", id="v2"),
        pytest.param(
            "swinv2_tiny_window8_256",
            r"\(layers\.0\.blocks\.0\.attn: Swin v2's attention is by cosines; layers\.0",
            id="v2-reason",
        ),
        pytest.param("swinv2_cr_tiny_ns_224", "Swin v2's attention is by cosines", id="v2-cr"),
        pytest.param("vit_tiny_patch16_224", "model is a VisionTransformer in which", id="vit"),
    ],
)
def test_other_models_of_timm(name, message):
    with torch.device("meta"):
        model = timm_package.create_model(name)
    with pytest.raises(ValueError, match=message):
        patch(model)


@pytest.mark.parametrize("function", [patch, unpatch])
def test_only_modules_are_taken(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("swin_tiny_patch4_window7_224")


def test_an_unknown_backend_changes_nothing():
    model = small_swin()
    before = contents(model)
    with pytest.raises(
        ValueError, match="backend must be one of cuda, triton, cpu, reference, got"
    ):
        patch(model, backend="quantum")
    assert contents(model) == before


@pytest.mark.parametrize("function", [patch, unpatch])
def test_without_timm_the_use_fails_and_says_why(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "xattn_ops.integrations._timm_modules")
    monkeypatch.delattr(xattn_ops.integrations, "_timm_modules")
    with pytest.raises(
        ImportError, match=r"needs timm 1\.0 or later.*pip install timm \(import of"
    ):
        function(nn.Linear(2, 2))
