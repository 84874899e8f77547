"""CoaT against the official implementation's numbers, and everything a user does with a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from goldens import facts, golden, image, layout, official_state, shared
from support.cases import BACKENDS, native
from support.models import backends, gradients, kinds, loss_of, on_meta, outputs, small_coat
from torch import Tensor

from xattn_ops import flops
from xattn_ops.models import create_model, list_models, load_official
from xattn_ops.models.coat import CoaT
from xattn_ops.models.layers import Mlp

LITE = ["coat_lite_tiny", "coat_lite_mini", "coat_lite_small", "coat_lite_medium"]
NAMES = [*LITE, "coat_tiny", "coat_mini", "coat_small"]

families = pytest.mark.parametrize("depth", [0, 2], ids=["lite", "coat"])


# ---- The official numbers -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("name", ["coat_lite_tiny", "coat_tiny", "coat_lite_tiny_features"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float64", "float32", "bfloat16"],
)
@torch.no_grad()
def test_goldens(name, dtype, tolerance, backend):
    features_only = name.endswith("_features")
    base = name.removesuffix("_features")
    model = create_model(base, features_only=features_only, backend=backend).to(dtype).eval()
    assert load_official(model, official_state(name)) == ([], [])
    x = image(1, 192, 256) if features_only else image(2, 224, 224)
    for y, official in zip(outputs(model, x.to(dtype)), golden(name), strict=True):
        assert y.dtype == dtype
        assert official.error(y) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_equal_the_official_ones(name):
    model = on_meta(name, backend="reference")
    assert sum(p.numel() for p in model.parameters()) == facts(name)["params"]
    macs = flops.count(model, (1, 3, 224, 224))[""]
    assert macs / 1e9 == pytest.approx(facts(name)["gmacs"], abs=6e-5)


@pytest.mark.parametrize("name", [*NAMES, "coat_lite_tiny_features", "coat_mini_features"])
def test_state_has_the_official_layout(name):
    model = on_meta(name.removesuffix("_features"), features_only=name.endswith("_features"))
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == layout(name)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in own.values()}) == len(own) - len(shared(name))
    for key, first in shared(name).items():
        assert own[key] is own[first], key


@kinds
@families
def test_state_dict_round_trip(depth, features_only, tmp_path):
    model = small_coat(depth, features_only=features_only).eval()
    torch.save(model.state_dict(), tmp_path / "coat.pt")
    other = small_coat(depth, features_only=features_only).eval()
    other.load_state_dict(torch.load(tmp_path / "coat.pt", weights_only=True))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(outputs(model, x), outputs(other, x), strict=True):
        assert torch.equal(a, b)
    assert not list(model.buffers())


# ---- Sizes --------------------------------------------------------------------------------------


@backends
@families
@pytest.mark.parametrize(("height", "width"), [(97, 131), (63, 32), (33, 70), (31, 225), (1, 1)])
def test_backbone_takes_any_size(depth, height, width, backend):
    model = small_coat(depth, features_only=True, backend=backend)
    maps = model(torch.randn(1, 3, height, width))
    for i, y in enumerate(maps):
        side = [max(size, 32) // (4 * 2**i) for size in (height, width)]
        assert list(y.shape) == [1, model.dims[i], *side]
        assert y.isfinite().all()
    sum(y.square().mean() for y in maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [224, 97, (64, 160), 8])
@pytest.mark.parametrize("name", ["coat_lite_tiny", "coat_tiny"])
@torch.no_grad()
def test_classifier_of_any_size(name, size):
    height, width = (size, size) if isinstance(size, int) else size
    y = create_model(name, num_classes=7, img_size=size)(torch.randn(1, 3, height, width))
    assert y.shape == (1, 7)
    assert y.isfinite().all()


@families
def test_what_is_beyond_the_last_patch_is_left_out(depth):
    model, x = small_coat(depth, features_only=True).eval(), torch.randn(1, 3, 67, 98)
    for a, b in zip(model(x), model(x[..., :64, :96]), strict=True):
        assert torch.equal(a, b)


@families
def test_small_images_are_padded_to_the_right_and_bottom(depth):
    model, x = small_coat(depth).eval(), torch.randn(1, 3, 20, 40)
    assert torch.equal(model(x), model(F.pad(x, (0, 0, 0, 12))))


@families
def test_empty_batch(depth):
    assert small_coat(depth)(torch.randn(0, 3, 64, 64)).shape == (0, 5)


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
        small_coat()(x)


# ---- Options ------------------------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize(
    ("depth", "options"),
    [
        pytest.param(0, {}, id="lite"),
        pytest.param(0, {"conv_position": False}, id="lite-no-position"),
        pytest.param(0, {"conv_relative": False}, id="lite-no-relative"),
        pytest.param(0, {"num_classes": 0, "checkpoint": True}, id="lite-no-head-checkpoint"),
        pytest.param(2, {}, id="coat"),
        pytest.param(2, {"conv_position": False, "conv_relative": False}, id="no-encodings"),
        pytest.param(2, {"co_scale": "direct"}, id="direct"),
        pytest.param(2, {"co_scale": "direct", "conv_relative": False}, id="direct-no-relative"),
        pytest.param(2, {"co_scale": "none"}, id="no-co-scale"),
        pytest.param(2, {"drop": 0.2, "drop_path": 0.3}, id="dropout"),
        pytest.param(2, {"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
    ],
)
def test_options_train(features_only, depth, options, backend):
    model = small_coat(depth, features_only=features_only, backend=backend, **options)
    for key, grad in gradients(model, torch.randn(2, 3, 70, 64)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        assert grad.abs().max() > 0 or options.get("drop_path"), key


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


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_trains_without_dropout_or_stochastic_depth(name):
    model = on_meta(name)
    blocks = [b for s in range(1, 5) for b in getattr(model, f"serial_blocks{s}")]
    assert {b.drop_path.rate for b in [*blocks, *model.parallel_blocks]} == {0.0}
    assert {m.drop for m in model.modules() if isinstance(m, Mlp)} == {0.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coat_tiny", {"co_scale": "sum"}, "co_scale is 'sum'; allowed are interpolation, direct"),
        ("coat_lite_tiny", {"co_scale": "none"}, "CoaT-Lite has no parallel group"),
        ("coat_tiny", {"drop_path": 1.0}, "drop path rate is 1"),
        ("coat_tiny", {"drop": -0.1}, "must be in"),
        ("coat_tiny", {"img_size": 0}, "img_size is 0"),
        ("coat_tiny", {"num_classes": -1}, "num_classes is -1"),
        ("coat_tiny", {"backend": "quantum"}, "quantum"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)(torch.randn(1, 3, 32, 32))


def test_a_parallel_group_needs_equal_widths():
    with pytest.raises(ValueError, match=r"dims are \(8, 8, 8, 16\); those of scales 2 to 4 must"):
        CoaT((8, 8, 8, 16), (1, 1, 1, 1), (2, 2, 2, 2), 1)


def test_names():
    assert set(NAMES) <= set(list_models())
    assert isinstance(on_meta("coat_lite_tiny_224"), CoaT)
    with pytest.raises(ValueError, match=r"unknown model 'coat_tinny'; did you mean coat_tiny"):
        create_model("coat_tinny")
    with pytest.raises(TypeError, match="colour"):
        create_model("coat_tiny", colour="red")


# ---- Training -----------------------------------------------------------------------------------


@families
def test_a_training_step_reduces_the_loss(depth):
    model = small_coat(depth, drop=0.05, drop_path=0.05)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 5
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
@families
def test_checkpointing_gives_the_same_gradients(depth, features_only, backend):
    options = {"drop": 0.2, "drop_path": 0.2, "features_only": features_only}
    model = small_coat(depth, backend=backend, **options)
    x, results = torch.randn(2, 3, 64, 64), []
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        torch.manual_seed(3)
        results.append(gradients(model, x))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key])


@pytest.mark.parametrize("options", [{"drop": 0.3}, {"drop_path": 0.6}], ids=str)
@families
def test_dropout_follows_the_seed(depth, options):
    model, x = small_coat(depth, **options), torch.randn(4, 3, 64, 64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(x)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_of_the_mlp():
    mlp, x, residual = Mlp(4, 8, 0.5), torch.randn(2000, 4), torch.randn(2000, 4)
    dropped = mlp(x, residual=residual) == residual
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(mlp.eval()(x, residual=residual), residual + mlp(x))


# ---- Backends and the rest of PyTorch -----------------------------------------------------------


@native
@kinds
@pytest.mark.parametrize(
    ("depth", "options"),
    [(0, {}), (2, {"drop": 0.2, "drop_path": 0.2}), (2, {"co_scale": "direct"})],
    ids=["lite", "coat-dropout", "direct"],
)
def test_backends_agree(features_only, depth, options):
    models = [
        small_coat(depth, features_only=features_only, backend=b, **options) for b in BACKENDS
    ]
    models[1].load_state_dict(models[0].state_dict())
    x, results = torch.randn(2, 3, 64, 70), []
    for model in models:
        torch.manual_seed(5)
        results.append(gradients(model, x))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5, msg=key)


@backends
@kinds
@families
def test_autocast_and_bfloat16(depth, features_only, backend):
    model = small_coat(depth, features_only=features_only, backend=backend)
    x = torch.randn(2, 3, 64, 64)
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
@pytest.mark.parametrize("co_scale", ["interpolation", "direct"])
def test_the_model_compiles_in_one_graph(co_scale, backend, fresh_compiler):
    model = small_coat(1, co_scale=co_scale, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    weights = [x, *(p for p in model.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(compiled(x).square().sum(), weights)
    plain = torch.autograd.grad(model(x).square().sum(), weights)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@kinds
@families
def test_export(depth, features_only):
    model, x = small_coat(depth, features_only=features_only).eval(), torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()(x)
    exported = [exported] if torch.is_tensor(exported) else exported
    for a, b in zip(exported, outputs(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
