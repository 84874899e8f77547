"""What is particular to CrossViT: its branches' sizes and positions, its rates, its checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import official_state
from support.models import check_misfit, on_meta, small_crossvit

from xattn_ops.models import create_model, load_official
from xattn_ops.models.crossvit_blocks import FUSIONS

X = (2, 3, 64, 96)  # the size that small_crossvit is for

fusions = pytest.mark.parametrize("fusion", FUSIONS)


# ---- Sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "small", "large"),
    [
        (224, 240, 224),
        (384, 408, 384),
        (480, 504, 480),
        (16, 12, 16),
        ((224, 448), (240, 480), (224, 448)),
        (250, 264, 240),
        (3, 12, 16),
    ],
)
def test_sizes_of_the_branches(size, small, large):
    """As the official models have them, and whole patches for others."""
    model = on_meta("crossvit_9", img_size=size)
    for branch, (patch, side) in enumerate([(12, small), (16, large)]):
        sides = (side, side) if isinstance(side, int) else side
        assert model.grids[branch] == tuple(s // patch for s in sides)
        rows, columns = model.grids[branch]
        assert model.pos_embed[branch].shape == (1, 1 + rows * columns, (128, 256)[branch])


def test_branches_resize_the_image_bicubically():
    """The image goes in at 240 and 224 pixels where the official code resizes to these."""
    model, x = small_crossvit(img_size=112, patches=(12, 16)).eval(), torch.randn(2, 3, 112, 112)
    seen = []
    for embed in model.patch_embed:
        embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    assert torch.equal(seen[1], x)
    torch.testing.assert_close(seen[0], F.interpolate(x, (120, 120), mode="bicubic"))


def test_positions_are_resized_bicubically():
    model, x = small_crossvit().eval(), torch.randn(1, 3, 128, 64)
    wide = small_crossvit(img_size=(128, 64)).eval()
    state = model.state_dict()
    for b, grid in enumerate(model.grids):
        cls, rest = model.pos_embed[b][:, :1], model.pos_embed[b][:, 1:]
        picture = rest.transpose(1, 2).unflatten(2, grid)
        resized = F.interpolate(picture, wide.grids[b], mode="bicubic", align_corners=False)
        state[f"pos_embed.{b}"] = torch.cat([cls, resized.flatten(2).transpose(1, 2)], 1)
    wide.load_state_dict(state)
    torch.testing.assert_close(model(x), wide(x))


@fusions
def test_empty_batch(fusion):
    assert small_crossvit(fusion=fusion)(torch.randn(0, 3, 64, 96)).shape == (0, 5)


# ---- Options ------------------------------------------------------------------------------------


def test_options_reach_the_layers():
    model = small_crossvit(drop=0.1, attn_drop=0.2, drop_path=0.3, num_classes=0).eval()
    rates = [b.drop_path.rate for stage in model.blocks for br in stage.blocks for b in br]
    assert rates == pytest.approx([0, *(0, 0.1), 0.2, *(0.2, 0.3)])  # small, large; small, large
    assert [f.drop_path.rate for s in model.blocks for f in s.fusion] == pytest.approx(
        [0.1, 0.1, 0.3, 0.3]
    )
    block, fusion = model.blocks[0].blocks[1][1], model.blocks[1].fusion[0]
    assert (model.drop, block.mlp.drop, block.attn.proj_drop, fusion.attn.proj_drop) == (0.1,) * 4
    assert (block.attn.attn_drop, fusion.attn.attn_drop) == (0.2, 0.2)
    assert model(torch.randn(X)).shape == (2, 24)


def test_size_in_the_name():
    assert on_meta("crossvit_15_dagger_384").grids == [(34, 34), (24, 24)]
    assert on_meta("crossvit_15_dagger_384", img_size=224).grids == [(20, 20), (14, 14)]


# ---- Checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_of_224_in_a_model_for_384():
    """As the paper fine-tunes, positions resized bicubically (section 4.1)."""
    state = official_state("crossvit_9_dagger")
    model = create_model("crossvit_9_dagger", img_size=(384, 480))
    assert load_official(model, state) == ([], [])
    for b, (side, grid) in enumerate([(20, (34, 42)), (14, (24, 30))]):
        rest = state[f"pos_embed.{b}"][:, 1:].float().transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(rest, grid, mode="bicubic", align_corners=False)
        ours = model.pos_embed[b]
        torch.testing.assert_close(ours[:, 1:], resized.flatten(2).transpose(1, 2))
        torch.testing.assert_close(ours[:, :1], state[f"pos_embed.{b}"][:, :1].float())


@pytest.mark.parametrize("fusion", ["cross_attention", "class_token", "pairwise"])
def test_classifier_checkpoint_in_a_backbone(fusion):
    classifier = small_crossvit(fusion=fusion, drop_path=0.0).eval()
    backbone = small_crossvit(fusion=fusion, features_only=True).eval()
    report = load_official(backbone, classifier.state_dict())
    assert report.kept == []
    last = {key.removeprefix("blocks.1.").split(".")[0] for key in report.ignored}
    fused = {"cross_attention": {"projs", "fusion", "revert_projs"}, "pairwise": set()}
    assert last == {"head"} | fused.get(fusion, {"projs", "revert_projs"})
    x = torch.randn(X)
    xs, grids = classifier.tokens(x)
    for y, norm, tokens, grid in zip(backbone(x), classifier.norm, xs, grids, strict=True):
        want = norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(y, want)
    with pytest.raises(ValueError, match=r"missing: .*head\.0\.bias"):
        load_official(classifier, backbone.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: s.update({"pos_embed.0": torch.ones(1, 1 + 39, 8)}),
            r"pos_embed.0 \(checkpoint \[1, 40, 8\], model \[1, 41, 8\]\)$",
            id="positions-not-square",
        ),
        pytest.param(
            lambda s: s.update({"pos_embed.1": torch.ones(1, 1 + 24, 8)}),
            r"pos_embed.1 \(checkpoint \[1, 25, 8\], model \[1, 25, 16\]\)$",
            id="positions-width",
        ),
        pytest.param(
            lambda s: s.update({"pos_embed.1": torch.ones(3)}),
            r"pos_embed.1 \(checkpoint \[3\]",
            id="positions-rank",
        ),
        pytest.param(lambda s: s.pop("cls_token.1"), "missing: cls_token.1$", id="missing"),
        pytest.param(lambda s: s.pop("pos_embed.0"), "missing: pos_embed.0$", id="no-positions"),
    ],
)
def test_misfits_are_named_and_change_nothing(change, message):
    model = small_crossvit()
    check_misfit(model, model.state_dict(), change, message)
