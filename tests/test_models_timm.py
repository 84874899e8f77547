"""timm's weights of CoaT and CrossViT in our models: the same keys, the same logits."""

from __future__ import annotations

import pytest
import torch
from support.models import on_meta
from support.timm import assert_near, lively, timm
from timm.models.crossvit import CrossVit
from torch import nn

from xattn_ops import flops
from xattn_ops.models import create_model, load_official

SIDES = {"240": "224", "408": "384"}  # of the small branch, which timm calls the model by, and ours


def ours(name: str) -> str:
    """What timm's model is called here."""
    for theirs, side in SIDES.items():
        name = name.replace(f"_{theirs}", "" if side == "224" else f"_{side}")
    return name.removesuffix("_384") if name.startswith("coat_") else name


@pytest.mark.parametrize("name", timm.list_models(["coat_*", "crossvit_*"]))
def test_every_state_of_timm_fits(name):
    """Keys and shapes; CoaT's norms that no head reads are missing."""
    model = on_meta(ours(name))
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    adapted, optional = model.adapt_official(state)
    own = {key: t.shape for key, t in model.state_dict().items()}
    missing = own.keys() - adapted.keys()
    scales = {"coat_lite": (1, 2, 3), "coat": (1,), "crossvit": ()}
    unread = next(scales[kind] for kind in scales if name.startswith(kind))
    assert missing == {f"norm{s}.{kind}" for s in unread for kind in ("weight", "bias")}
    assert all(key.startswith(optional) for key in missing)
    assert {key: t.shape for key, t in adapted.items()} == {k: own[k] for k in own.keys() - missing}


def loaded(model: nn.Module, name: str, **options: int) -> nn.Module:
    """Ours with the weights of timm's."""
    twin = create_model(name, num_classes=model.num_classes, **options)
    report = load_official(twin, model.state_dict())
    assert report.ignored == []
    assert all(key.startswith("norm") for key in report.kept)
    return twin.eval()


@pytest.mark.parametrize("name", ["coat_lite_tiny", "coat_tiny"])
@torch.no_grad()
def test_logits_of_coat(name):
    model = lively(timm.create_model(name, num_classes=7, img_size=(64, 96))).eval()
    x = torch.randn(2, 3, 64, 96)
    assert_near(loaded(model, name)(x), model(x))


@pytest.mark.parametrize("name", ["crossvit_9", "crossvit_9_dagger"])
@torch.no_grad()
def test_logits_of_crossvit(name):
    """timm's at the size of the large branch, as the official models: see also below."""
    scaled = {"img_size": 224, "img_scale": (240 / 224, 1.0)}
    model = lively(timm.create_model(f"{name}_240", num_classes=7, **scaled)).eval()
    x = torch.randn(1, 3, 224, 224)
    assert_near(loaded(model, name)(x), model(x))


@torch.no_grad()
def test_logits_of_crossvit_at_timms_own_size():
    """timm takes 240 pixels and shrinks them for the large branch; ours takes 224 and enlarges.

    An image that stays the same either way shows that the weights are read as timm reads them.
    """
    model = lively(timm.create_model("crossvit_9_240", num_classes=7)).eval()
    colours = torch.randn(2, 3, 1, 1)
    got = loaded(model, "crossvit_9")(colours.expand(2, 3, 224, 224))
    assert_near(got, model(colours.expand(2, 3, 240, 240)))


def test_position_embeddings_of_timm_are_resized():
    model = timm.create_model("crossvit_9_240", num_classes=7)
    small = loaded(model, "crossvit_9", img_size=96)
    whole = loaded(model, "crossvit_9")
    for b, (grid, before) in enumerate(zip(small.grids, whole.grids, strict=True)):
        picture = whole.pos_embed[b][:, 1:].mT.unflatten(2, before)
        resized = nn.functional.interpolate(picture, grid, mode="bicubic", align_corners=False)
        torch.testing.assert_close(small.pos_embed[b][:, 1:], resized.flatten(2).mT)


def test_macs_of_several_cross_attentions_in_a_row():
    """Table 7 D, L = 2: timm's second module sees the CLS token alone, and has the paper's 5.6.

    Ours sees the patches too: test_models_crossvit_paper.
    """
    sizes = {"embed_dim": (192, 384), "num_heads": (6, 6), "mlp_ratio": (4, 4, 1)}
    options = {"depth": ((1, 4, 2),) * 3, "img_size": 224, "img_scale": (240 / 224, 1.0)}
    model = CrossVit(patch_size=(12, 16), **sizes, **options)
    assert f"{flops.count(model, (1, 3, 224, 224))[''] / 1e9:.1f}" == "5.6"
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "_" in n.split(".")[-1])
    count = sum(p.numel() for p in model.parameters())
    assert f"{(count - embeddings) / 1e6:.1f}" == "28.9"


@pytest.mark.parametrize(
    ("name", "key"), [("coat_lite_tiny", "norm4.weight"), ("crossvit_9_240", "pos_embed.0")]
)
def test_a_key_that_is_read_must_be_there(name, key):
    state = timm.create_model(name).state_dict()
    del state[key.replace("pos_embed.0", "pos_embed_0")]
    with pytest.raises(ValueError, match=f"missing: {key}$"):
        load_official(create_model(ours(name)), state)


def test_into_a_backbone():
    model = timm.create_model("coat_lite_tiny")
    backbone = create_model("coat_lite_tiny", features_only=True)
    report = load_official(backbone, model.state_dict())
    assert report == (["head.bias", "head.weight", "norm4.bias", "norm4.weight"], [])
    assert torch.equal(backbone.cpe1.proj.weight, model.cpe1.proj.weight)
