"""CAT against the official implementation's numbers, and everything a user does with a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from goldens import INDEX, facts, golden, image, layout, official_state
from support.cases import BACKENDS, native
from support.models import backends, gradients, kinds, loss_of, on_meta, outputs
from torch import Tensor, nn

from xattn_ops.models import create_model, list_models, load_official
from xattn_ops.models.cat import CAT, Stage
from xattn_ops.models.layers import DropPath, interleave, pad_to_multiple

NAMES = ["cat_tiny", "cat_small", "cat_base"]


def small(**options) -> CAT:
    """A CAT of two stages, 8 and 16 channels, on 56 x 56 images unless told otherwise."""
    options = {"num_classes": 5, "img_size": 56, "drop_path": 0.0, **options}
    return CAT(8, (2, 1), (2, 4), **options)


def official(features_only: bool, dtype: torch.dtype, backend: str | None) -> nn.Module:
    model = create_model("cat_tiny", features_only=features_only, backend=backend)
    model = model.to(dtype).eval()
    report = load_official(model, official_state(name(features_only)))
    assert report == ([], [])
    return model


def name(features_only: bool) -> str:
    return "cat_tiny_features" if features_only else "cat_tiny"


# ---- The official numbers -----------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float64", "float32", "bfloat16"],
)
@torch.no_grad()
def test_goldens(features_only, dtype, tolerance, backend):
    model = official(features_only, dtype, backend)
    x = image(1, 192, 256) if features_only else image(2, 224, 224)
    expected = golden(name(features_only))
    for y, official_y in zip(outputs(model, x.to(dtype)), expected, strict=True):
        assert y.dtype == dtype
        assert official_y.error(y) < tolerance


@pytest.mark.parametrize("model_name", NAMES)
def test_parameter_counts(model_name):
    model = on_meta(model_name)
    assert sum(p.numel() for p in model.parameters()) == facts(model_name)["params"]


@pytest.mark.parametrize(
    ("model_name", "features_only"),
    [*((n, False) for n in NAMES), ("cat_tiny", True), ("cat_small", True)],
)
def test_state_has_the_official_layout(model_name, features_only):
    model = on_meta(model_name, features_only=features_only)
    expected = layout(model_name + "_features" * features_only)
    expected = {key: shape for key, shape in expected.items() if not key.endswith(INDEX)}
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == expected


@kinds
def test_state_dict_round_trip(features_only, tmp_path):
    model = small(features_only=features_only).eval()
    torch.save(model.state_dict(), tmp_path / "cat.pt")
    other = small(features_only=features_only).eval()
    other.load_state_dict(torch.load(tmp_path / "cat.pt", weights_only=True))
    x = torch.randn(1, 3, 56, 56)
    for a, b in zip(outputs(model, x), outputs(other, x), strict=True):
        assert torch.equal(a, b)
    assert not list(model.buffers())


# ---- Sizes --------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("height", "width"), [(97, 131), (225, 160), (56, 224), (33, 32), (4, 60), (1, 1)]
)
def test_backbone_takes_any_size(height, width, backend):
    model = create_model("cat_tiny", features_only=True, drop_path=0.0, backend=backend)
    maps = model(torch.randn(1, 3, height, width))
    for i, y in enumerate(maps):
        side = [-(-size // (4 * 2**i)) for size in (height, width)]
        assert list(y.shape) == [1, 64 * 2**i, *side]
        assert y.isfinite().all()
    sum(y.square().mean() for y in maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [224, 256, 97, (64, 160), (250, 100), 32])
def test_classifier_of_any_size(size):
    model = create_model("cat_tiny", num_classes=7, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    y = model(torch.randn(1, 3, height, width))
    assert y.shape == (1, 7)
    assert y.isfinite().all()


def test_patch_shrinks_with_the_stage():
    model = create_model("cat_tiny", img_size=(96, 160))  # stages 24x40, 12x20, 6x10, 3x5
    windows = [layer.pre_ipsa_blocks[0].attn.window for layer in model.layers]
    assert windows == [(7, 7), (7, 7), (6, 6), (3, 3)]
    assert [layer.cpsa_blocks[0].attn.patch for layer in model.layers] == windows
    backbone = create_model("cat_tiny", img_size=(96, 160), features_only=True)
    assert {layer.cpsa_blocks[0].attn.patch for layer in backbone.layers} == {(7, 7)}


def test_empty_batch():
    assert small()(torch.randn(0, 3, 56, 56)).shape == (0, 5)


def test_image_padding_is_zeros_to_the_right_and_bottom():
    model = small(features_only=True).eval()
    x = torch.randn(1, 3, 50, 53)
    for a, b in zip(model(x), model(F.pad(x, (0, 3, 0, 2))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 56, 56), r"image is \[3, 56, 56\]; it must be \[B, 3, H, W\]"),
        (torch.ones(1, 4, 56, 56), r"\[1, 4, 56, 56\]"),
        (torch.ones(1, 3, 56, 60), "image is 56 x 60; this classifier takes 56 x 56"),
    ],
)
def test_bad_images(x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


def test_image_without_pixels():
    with pytest.raises(ValueError, match="sides must be at least 1"):
        small(features_only=True)(torch.ones(1, 3, 0, 8))


# ---- Options ------------------------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"patch_embed": "slice"}, id="slice"),
        pytest.param({"cpsa_heads": "patch"}, id="multi-head"),
        pytest.param({"cpsa_heads": 7}, id="seven-heads"),
        pytest.param({"shift": True}, id="shift"),
        pytest.param({"ape": False}, id="no-ape"),
        pytest.param({"attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
        pytest.param({"mlp_ratio": 2.0, "num_classes": 0}, id="no-head"),
        pytest.param({"checkpoint": True}, id="checkpoint"),
    ],
)
def test_options_train(features_only, options, backend):
    model = small(features_only=features_only, backend=backend, **options)
    for key, grad in gradients(model, torch.randn(2, 3, 56, 56)).items():
        assert grad.isfinite().all(), key
        assert grad.abs().max() > 0 or options.get("drop_path"), key


def test_options_reach_the_layers():
    shifted = small(shift=True)
    assert shifted.layers[0].pre_ipsa_blocks[0].attn.shift == (0, 0)
    assert shifted.layers[0].post_ipsa_blocks[1].attn.shift == (3, 3)
    assert shifted.layers[1].post_ipsa_blocks[0].attn.shift == (0, 0)  # one 7x7 window
    assert small(cpsa_heads="patch").layers[0].cpsa_blocks[0].attn.num_heads == 7
    assert small(ape=False).ape is None
    attn = small(attn_drop=0.2).layers[0]
    assert attn.cpsa_blocks[0].attn.attn_drop == attn.pre_ipsa_blocks[0].attn.attn_drop == 0.2
    no_head = small(num_classes=0).eval()
    assert no_head(torch.randn(1, 3, 56, 56)).shape == (1, 16)


@pytest.mark.parametrize(("model_name", "rate"), list(zip(NAMES, (0.1, 0.2, 0.3), strict=True)))
def test_drop_path_rates_grow_linearly(model_name, rate):
    model = on_meta(model_name)
    blocks = [b for layer in model.layers for b in layer.pre_ipsa_blocks]
    rates = [b.drop_path.rate for b in blocks]
    assert rates == pytest.approx([rate * i / (len(blocks) - 1) for i in range(len(blocks))])
    assert rates == [b.drop_path.rate for layer in model.layers for b in layer.cpsa_blocks]


def test_without_ape_a_classifier_takes_other_sizes():
    assert small(ape=False)(torch.randn(1, 3, 61, 90)).shape == (1, 5)


def test_slice_orders_pixels_as_two_interleaves():
    image, dim = torch.randn(1, 3, 8, 12), 6
    embed = CAT(dim, (1,), (1,), patch_embed="slice", img_size=(8, 12)).patch_embed

    def halve(x: Tensor) -> Tensor:
        parts = [x[..., dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
        return torch.cat(parts, 1)

    expected = embed.norm(embed.proj(halve(halve(image))).permute(0, 2, 3, 1))
    torch.testing.assert_close(embed(image), expected)


def test_interleave_order():
    x = torch.arange(4.0).view(1, 2, 2, 1)  # pixel values 0 1 / 2 3
    assert interleave(x).flatten().tolist() == [0, 2, 1, 3]
    assert pad_to_multiple(torch.ones(1, 3, 5, 2), 4).shape == (1, 4, 8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_embed": "fold"}, "patch_embed is 'fold'; allowed are 'conv' and 'slice'"),
        ({"cpsa_heads": "many"}, "cpsa_heads is 'many'"),
        ({"cpsa_heads": 5}, "num_heads"),
        ({"drop_path": 1.0}, "drop path rate is 1"),
        ({"img_size": 0}, "img_size is 0"),
        ({"img_size": (3, 4, 5)}, "img_size is"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"backend": "quantum"}, "quantum"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("cat_tiny", **{"img_size": 32, **options})(torch.randn(1, 3, 32, 32))


def test_names():
    assert list_models() == sorted(list_models())
    assert set(NAMES) <= set(list_models())
    assert isinstance(on_meta("cat_tiny_224"), CAT)
    with pytest.raises(ValueError, match=r"unknown model 'cat_tny'; did you mean cat_tiny"):
        create_model("cat_tny")
    with pytest.raises(TypeError, match="colour"):
        create_model("cat_tiny", colour="red")


# ---- Training -----------------------------------------------------------------------------------


def test_a_training_step_reduces_the_loss():
    model = small(attn_drop=0.1, drop_path=0.1)
    x, y = torch.randn(8, 3, 56, 56), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


@backends
@kinds
def test_checkpointing_gives_the_same_gradients(features_only, backend):
    options = {"attn_drop": 0.2, "drop_path": 0.2, "features_only": features_only}
    model = small(backend=backend, **options)
    x, results = torch.randn(2, 3, 56, 56), []
    for checkpoint in (False, True):
        for layer in model.layers:
            layer.checkpoint = checkpoint
        torch.manual_seed(3)
        results.append(gradients(model, x))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


@backends
@pytest.mark.parametrize("options", [{"attn_drop": 0.3}, {"drop_path": 0.6}], ids=str)
def test_dropout_follows_the_seed(options, backend):
    model, x = small(backend=backend, **options), torch.randn(4, 3, 56, 56)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(x)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_drop_path_drops_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    branch, shortcut = torch.ones(4000, 2, 3), torch.full((4000, 2, 3), 5.0)
    out = layer(branch, shortcut)
    samples = (out - shortcut).flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1))
    values = samples[:, 0].unique()
    torch.testing.assert_close(values, torch.tensor([0, 4 / 3]))
    assert samples.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(branch, shortcut), shortcut + branch)


# ---- Backends and the rest of PyTorch -----------------------------------------------------------


@native
@kinds
@pytest.mark.parametrize("options", [{}, {"attn_drop": 0.2, "shift": True}], ids=["plain", "all"])
def test_backends_agree(features_only, options):
    models = [small(features_only=features_only, backend=b, **options) for b in BACKENDS]
    models[1].load_state_dict(models[0].state_dict())
    x, results = torch.randn(2, 3, 56, 56), []
    for model in models:
        torch.manual_seed(5)
        results.append({"loss": loss_of(model, x), **gradients_at(model, x)})
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5, msg=key)


def gradients_at(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return gradients(model, x)


@backends
@kinds
def test_autocast_and_bfloat16(features_only, backend):
    model, x = small(features_only=features_only, backend=backend), torch.randn(2, 3, 56, 56)
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
def test_a_cross_attention_block_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    stage = Stage(
        16, 2, 7, [0.0], cpsa_heads=1, shift=3, attn_drop=0.0, mlp_ratio=4.0,
        checkpoint=False, last=True, backend=backend,
    )  # fmt: skip
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 15, 14, 16, requires_grad=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), [x, *stage.parameters()])
    plain = torch.autograd.grad(stage(x).square().sum(), [x, *stage.parameters()])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@kinds
def test_export(features_only):
    model, x = small(features_only=features_only).eval(), torch.randn(2, 3, 56, 56)
    program = torch.export.export(model, (x,))
    exported = program.module()(x)
    exported = [exported] if torch.is_tensor(exported) else exported
    for a, b in zip(exported, outputs(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
