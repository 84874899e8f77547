"""CrossViT against the official implementation's numbers, and all that a user does with a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from goldens import facts, golden, image, layout, official_state
from support.cases import BACKENDS, native
from support.models import backends, gradients, kinds, loss_of, on_meta, outputs, small_crossvit
from torch import Tensor

from xattn_ops import flops
from xattn_ops.models import create_model, list_models, load_official
from xattn_ops.models.crossvit import CrossViT
from xattn_ops.models.crossvit_blocks import FUSIONS

OF_384 = ["crossvit_15_dagger_384", "crossvit_18_dagger_384"]
NAMES = [
    *(f"crossvit_{name}" for name in ("tiny", "small", "base", "9", "15", "18")),
    *(f"crossvit_{name}_dagger" for name in ("9", "15", "18")),
    *OF_384,
]
X = (2, 3, 64, 96)  # the size that small_crossvit is for

fusions = pytest.mark.parametrize("fusion", FUSIONS)


# ---- The official numbers -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("name", ["crossvit_small", "crossvit_9", "crossvit_9_dagger"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float64", "float32", "bfloat16"],
)
@torch.no_grad()
def test_goldens(name, dtype, tolerance, backend):
    model = create_model(name, backend=backend).to(dtype).eval()
    assert load_official(model, official_state(name)) == ([], [])
    y = model(image(2, 224, 224).to(dtype))
    assert y.dtype == dtype
    assert golden(name)[0].error(y) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_equal_the_official_ones(name):
    model, side = on_meta(name, backend="reference"), facts(name)["input"]
    assert sum(p.numel() for p in model.parameters()) == facts(name)["params"]
    macs = flops.count(model, (1, 3, side, side))[""]
    assert macs / 1e9 == pytest.approx(facts(name)["gmacs"], abs=6e-5)


def test_macs_are_the_same_with_the_kernels():
    """On a real CPU the branches' attention is another op than on meta, and it counts too."""
    counts = {flops.count(small_crossvit(backend=backend), (1, *X[1:]))[""] for backend in BACKENDS}
    with torch.device("meta"):
        counts.add(flops.count(small_crossvit(backend="reference"), (1, *X[1:]))[""])
    assert len(counts) == 1


@pytest.mark.parametrize("name", NAMES)
def test_state_has_the_official_layout(name):
    model = on_meta(name)
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == layout(name)
    assert not list(model.buffers())


@kinds
def test_state_dict_round_trip(features_only, tmp_path):
    model = small_crossvit(features_only=features_only).eval()
    torch.save(model.state_dict(), tmp_path / "crossvit.pt")
    other = small_crossvit(features_only=features_only).eval()
    other.load_state_dict(torch.load(tmp_path / "crossvit.pt", weights_only=True))
    x = torch.randn(X)
    for a, b in zip(outputs(model, x), outputs(other, x), strict=True):
        assert torch.equal(a, b)


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


@backends
@kinds
@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 131), (40, 200), (16, 11), (1, 1)])
def test_images_of_any_size(features_only, height, width, backend):
    model = small_crossvit(features_only=features_only, backend=backend)
    ys = outputs(model, torch.randn(2, 3, height, width))
    grids = model.grids_of(height, width)
    shapes = [[2, c, *grid] for c, grid in zip((8, 16), grids, strict=True)]
    assert [list(y.shape) for y in ys] == (shapes if features_only else [[2, 5]])
    assert all(y.isfinite().all() for y in ys)
    loss_of(model, torch.randn(2, 3, height, width)).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


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


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 64, 64), r"image is \[3, 64, 64\]; it must be \[B, 3, H, W\]"),
        (torch.ones(1, 4, 64, 64), r"\[1, 4, 64, 64\]"),
        (torch.ones(1, 3, 0, 8), "sides must be at least 1"),
    ],
)
def test_bad_images(x, message):
    with pytest.raises(ValueError, match=message):
        small_crossvit()(x)


# ---- Options ------------------------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param({"fusion": fusion}, id=fusion) for fusion in FUSIONS),
        pytest.param({"fusion_depth": 3}, id="fusion-depth"),
        pytest.param({"dims": (8, 8)}, id="equal-widths"),
        pytest.param({"depths": (3, 1)}, id="deep-small-branch"),
        pytest.param({"patches": (8, 16)}, id="patches"),
        pytest.param({"stages": 1, "checkpoint": True}, id="one-stage-checkpoint"),
        pytest.param({"tokenizer": "conv"}, id="conv"),
        pytest.param({"tokenizer": "t2t"}, id="t2t"),
        pytest.param({"drop": 0.2, "attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
        pytest.param({"num_classes": 0}, id="no-head"),
    ],
)
def test_options_train(features_only, cls_token, options, backend):
    given = {"drop_path": 0.0, "features_only": features_only, "cls_token": cls_token, **options}
    model = small_crossvit(backend=backend, **given)
    for key, grad in gradients(model, torch.randn(X)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        idle = "wk.bias" in key or (given["drop_path"] and "blocks" in key)
        assert grad.abs().max() > 0 or idle, key


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion is 'sum'; allowed are none, all_attention, class_token"),
        ({"tokenizer": "cnn"}, "tokenizer is 'cnn'; allowed are linear, conv, t2t"),
        ({"tokenizer": "conv", "patches": (8, 16)}, "patches holds 8; this tokenizer makes"),
        ({"tokenizer": "t2t", "patches": (12, 14)}, "patches holds 14; this tokenizer makes"),
        ({"stages": 0}, "stages is 0; it must be at least 1"),
        ({"fusion_depth": 0}, "fusion_depth is 0; it must be at least 1"),
        ({"depths": (1, 0)}, r"depths\[1\] is 0; it must be at least 1"),
        ({"depths": (1, 2, 3)}, r"depths is \(1, 2, 3\); it must have one number for each"),
        ({"patches": (0, 16)}, r"patches\[0\] is 0"),
        ({"heads": 5}, "num_heads must divide dim, 256, got 5"),
        ({"drop_path": 1.0}, "drop path rate is 1"),
        ({"img_size": 0}, "img_size is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"attn_drop": 1.0}, "attn_drop must be in"),
        ({"backend": "quantum"}, "quantum"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("crossvit_9", **options)(torch.randn(1, 3, 32, 32))


def test_names():
    assert set(NAMES) <= set(list_models())
    assert isinstance(on_meta("crossvit_9_224"), CrossViT)
    assert on_meta("crossvit_15_dagger_384").grids == [(34, 34), (24, 24)]
    assert on_meta("crossvit_15_dagger_384", img_size=224).grids == [(20, 20), (14, 14)]
    with pytest.raises(TypeError, match="colour"):
        create_model("crossvit_9", colour="red")


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
    changed, before = dict(model.state_dict()), copy.deepcopy(model.state_dict())
    change(changed)
    with pytest.raises(ValueError, match=message):
        load_official(model, changed)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# ---- Training -----------------------------------------------------------------------------------


def test_a_training_step_reduces_the_loss():
    model = small_crossvit(drop=0.05, attn_drop=0.05, drop_path=0.05)
    x, y = torch.randn(8, *X[1:]), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


@backends
@kinds
def test_checkpointing_gives_the_same_gradients(features_only, backend):
    options = {"drop": 0.2, "attn_drop": 0.2, "drop_path": 0.2, "features_only": features_only}
    x, results = torch.randn(X), []
    model = small_crossvit(backend=backend, **options)
    for checkpoint in (False, True):
        for stage in model.blocks:
            stage.checkpoint = checkpoint
        torch.manual_seed(3)
        results.append(gradients(model, x))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


@pytest.mark.parametrize("options", [{"drop": 0.3}, {"attn_drop": 0.5}, {"drop_path": 0.6}])
def test_dropout_follows_the_seed(options):
    model = small_crossvit(**{"drop_path": 0.0, **options})
    x = torch.randn(4, *X[1:])

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(x)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


# ---- Backends and the rest of PyTorch -----------------------------------------------------------


@native
@kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"cls_token": False}, {"fusion_depth": 2}, {"drop": 0.2, "drop_path": 0.2}],
    ids=["plain", "no-cls", "fusion-depth", "dropout"],
)
def test_backends_agree(features_only, options):
    models = [
        small_crossvit(features_only=features_only, backend=backend, **options)
        for backend in BACKENDS
    ]
    models[1].load_state_dict(models[0].state_dict())
    x, results = torch.randn(X), []
    for model in models:
        torch.manual_seed(5)
        results.append(gradients(model, x))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5, msg=key)


@backends
@kinds
def test_autocast_and_bfloat16(features_only, backend):
    model, x = small_crossvit(features_only=features_only, backend=backend), torch.randn(X)
    exact = outputs(model.eval(), x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs(model, x)
        loss_of(model, x).backward()
    half = outputs(copy.deepcopy(model).bfloat16(), x.bfloat16())
    for a, b, c in zip(exact, cast, half, strict=True):
        magnitude = a.abs().mean().item()
        assert (a - b).abs().mean().item() < 0.05 * magnitude
        assert (a - c).abs().mean().item() < 0.05 * magnitude


@backends
@fusions
def test_the_model_compiles_in_one_graph(fusion, backend, fresh_compiler):
    model = small_crossvit(fusion=fusion, backend=backend, drop_path=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(X, requires_grad=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@kinds
def test_export(features_only):
    model, x = small_crossvit(features_only=features_only).eval(), torch.randn(X)
    exported = torch.export.export(model, (x,)).module()(x)
    exported = [exported] if torch.is_tensor(exported) else exported
    for a, b in zip(exported, outputs(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
