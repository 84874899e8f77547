"""CabViT against the official implementation's numbers, and everything a user does with a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from goldens import facts, golden, image, layout, official_state
from support.cases import BACKENDS, native
from support.models import (
    backends,
    cabvits,
    gradients,
    kinds,
    loss_of,
    on_meta,
    outputs,
    small_cabvit,
    small_plain_cabvit,
)
from torch import Tensor, nn

from xattn_ops import flops
from xattn_ops.models import create_model, list_models, load_official
from xattn_ops.models.cabvit import CabViT, PlainCabViT
from xattn_ops.models.cabvit_blocks import averages

OFFICIAL = ["cabvit_h_l1", "cabvit_h_l2", "cabvit_h_l3"]
NAMES = [*OFFICIAL, "cabvit_p_l0"]
X = (2, 3, 64, 96)  # the size that the small models are for


# ---- The official numbers -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float64", "float32", "bfloat16"],
)
@torch.no_grad()
def test_goldens(dtype, tolerance, backend):
    model = create_model("cabvit_h_l1", backend=backend).to(dtype).eval()
    assert load_official(model, official_state("cabvit_h_l1")) == ([], [])
    y = model(image(2, 224, 224).to(dtype))
    assert y.dtype == dtype
    assert golden("cabvit_h_l1")[0].error(y) < tolerance


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters_and_macs_equal_the_official_ones(name):
    """The official code projects digests to queries too, which nobody reads; ours does not."""
    model = on_meta(name, backend="reference")
    assert sum(p.numel() for p in model.parameters()) == facts(name)["params"]
    blocks = [block for stage in (3, 4) for block in model.cab_blocks(stage)]
    unread = sum(block.num_digests * block.qkv.in_features**2 for block in blocks)
    macs = flops.count(model, (1, 3, 224, 224))[""]
    assert (macs + unread) / 1e9 == pytest.approx(facts(name)["gmacs"], abs=6e-5)


@cabvits
def test_macs_are_the_same_with_the_kernels(small):
    counts = {
        flops.count(small(backend=backend), (1, *X[1:]))[""] for backend in ("reference", None)
    }
    with torch.device("meta"):
        counts.add(flops.count(small(backend="reference"), (1, *X[1:]))[""])
    assert len(counts) == 1


@pytest.mark.parametrize("name", OFFICIAL)
def test_state_has_the_official_layout(name):
    model = on_meta(name)
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == layout(name)


@kinds
@cabvits
def test_state_dict_round_trip(small, features_only, tmp_path):
    model = small(features_only=features_only)
    model(torch.randn(X))  # running statistics of their own
    torch.save(model.state_dict(), tmp_path / "cabvit.pt")
    other = small(features_only=features_only).eval()
    other.load_state_dict(torch.load(tmp_path / "cabvit.pt", weights_only=True))
    x = torch.randn(X)
    for a, b in zip(outputs(model.eval(), x), outputs(other, x), strict=True):
        assert torch.equal(a, b)


# ---- Sizes --------------------------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 131), (40, 200), (31, 33), (1, 1)])
def test_images_of_any_size(features_only, height, width, backend):
    model = small_cabvit(features_only=features_only, backend=backend).eval()
    ys = outputs(model, torch.randn(2, 3, height, width))
    sides = [[-(-size // (4 * 2**i)) for size in (height, width)] for i in range(4)]
    maps = [[2, dim, *side] for dim, side in zip((8, 8, 8, 16), sides, strict=True)]
    assert [list(y.shape) for y in ys] == (maps if features_only else [[2, 5]])
    for key, grad in gradients(model, torch.randn(2, 3, height, width)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key


@backends
@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 131), (40, 200), (7, 1)])
def test_plain_models_take_images_of_any_size(height, width, backend):
    model = small_plain_cabvit(features_only=True, backend=backend).eval()
    (y,) = model(torch.randn(2, 3, height, width))
    assert list(y.shape) == [2, 8, max(height // 8, 1), max(width // 8, 1)]
    for key, grad in gradients(model, torch.randn(2, 3, height, width)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key


@pytest.mark.parametrize("size", [256, 97, (64, 160)])
@torch.no_grad()
def test_classifier_of_any_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = create_model("cabvit_h_l1", num_classes=7, img_size=size).eval()
    y = model(torch.randn(1, 3, height, width))
    assert y.shape == (1, 7)
    assert y.isfinite().all()
    block = model.cab_blocks(3)[2]
    assert block.grid == (-(-height // 16), -(-width // 16))
    assert block.num_digests == 2 * -(-block.grid[0] // 4) * -(-block.grid[1] // 4)


@cabvits
def test_empty_batch(small):
    assert small().eval()(torch.randn(0, *X[1:])).shape == (0, 5)


@cabvits
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 64, 64), r"image is \[3, 64, 64\]; it must be \[B, 3, H, W\]"),
        (torch.ones(1, 4, 64, 64), r"\[1, 4, 64, 64\]"),
        (torch.ones(1, 3, 0, 8), "sides must be at least 1"),
    ],
)
def test_bad_images(small, x, message):
    with pytest.raises(ValueError, match=message):
        small()(x)


# ---- Options ------------------------------------------------------------------------------------

ALONE = {"digests": False, "tme": False}
HYBRID = [
    pytest.param({}, id="all"),
    pytest.param({"digest_scale": False}, id="no-scale"),
    pytest.param({"tme": False}, id="no-tme"),
    pytest.param({"digests": False}, id="no-digests"),
    pytest.param(ALONE, id="global"),
    pytest.param({**ALONE, "attention": "window"}, id="window"),
    pytest.param({**ALONE, "attention": "none"}, id="convnext"),
    pytest.param({"embed": "patch"}, id="patch"),
    pytest.param({"attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
    pytest.param({"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
    pytest.param({"mlp_ratio": 2.0, "layer_scale": 1.0}, id="ratio"),
]


@backends
@kinds
@pytest.mark.parametrize("options", HYBRID)
def test_options_train(features_only, options, backend):
    given = {"drop_path": 0.0, "features_only": features_only, "backend": backend, **options}
    train(small_cabvit(**given), "drop_path" in options)


@backends
@kinds
@pytest.mark.parametrize(
    "options",
    [
        *HYBRID[:5],
        pytest.param({"pos_embed": False}, id="no-positions"),
        pytest.param({"attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
        pytest.param({"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
    ],
)
def test_options_of_plain_models_train(features_only, options, backend):
    given = {"drop_path": 0.0, "features_only": features_only, "backend": backend, **options}
    # what changes the patches of the last block alone is nothing to a head that reads CLS
    unread = () if features_only else ("blocks.2.attention_biases", "blocks.2.local_conv")
    train(small_plain_cabvit(**given), "drop_path" in options, unread)


def train(model: nn.Module, drops: bool, unread: tuple[str, ...] = ()) -> None:
    for key, grad in gradients(model, torch.randn(X)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        assert (grad.abs().max() > 0) != key.startswith(unread) or drops, key


def test_options_reach_the_layers():
    model = small_cabvit(attn_drop=0.1, drop_path=0.6, num_classes=0).eval()
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert model.cab_blocks(3)[0].attn_drop == 0.1
    assert model(torch.randn(X)).shape == (2, 16)
    shifts = [b.attn.shift for b in small_cabvit(img_size=256, attention="window", **ALONE)
              .stages[2].blocks]  # fmt: skip
    assert shifts == [(0, 0), (3, 3), (0, 0)]
    one = small_cabvit(img_size=112, attention="window", **ALONE)
    assert {block.attn.shift for block in one.stages[2].blocks} == {(0, 0)}
    keys = {key.split(".", 3)[-1] for key in small_cabvit(tme=False).state_dict()}
    assert not {"dw_conv.weight", "local_conv.c.weight"} & keys
    assert "s_scale_factors" in keys
    keys = {key.split(".", 3)[-1] for key in small_cabvit(digests=False).state_dict()}
    assert not {"dw_conv.weight", "s_scale_factors", "s_token_bias", "s_norm.weight"} & keys
    assert "local_conv.c.weight" in keys


def test_digests_without_a_merge_are_means_of_4_x_4_tokens():
    x = torch.randn(2, 9 * 6, 3)
    image = x.unflatten(1, (9, 6))
    cells = [
        image[:, y : y + 4, c : c + 4].mean((1, 2)) for y in range(0, 9, 4) for c in range(0, 6, 4)
    ]
    torch.testing.assert_close(averages(x, (9, 6)), torch.stack(cells, 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h_l1", {"attention": "sparse"}, "attention is 'sparse'; allowed are global, window, no"),
        ("h_l1", {"embed": "linear"}, "embed is 'linear'; allowed are conv, patch"),
        ("h_l1", {"attention": "window"}, "attention is 'window'; digests and tme go with 'glob"),
        ("h_l1", {"head_dim": 48}, "head_dim must divide the channels of stages 3 and 4, 320"),
        ("p_l0", {"heads": 5}, "heads must divide dim, 192, got 5"),
        ("h_l1", {"drop_path": 1.0}, "drop path rate is 1"),
        ("h_l1", {"attn_drop": -0.1}, "attn_drop must be in"),
        ("h_l1", {"img_size": 0}, "img_size is 0"),
        ("p_l0", {"num_classes": -1}, "num_classes is -1"),
        ("h_l1", {"backend": "quantum"}, "quantum"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(f"cabvit_{name}", **options)(torch.randn(2, 3, 32, 32))


def test_names():
    assert set(NAMES) <= set(list_models())
    assert isinstance(on_meta("cabvit_h_l1_224"), CabViT)
    assert isinstance(on_meta("cabvit_p_l0"), PlainCabViT)
    with pytest.raises(TypeError, match="colour"):
        create_model("cabvit_p_l0", colour="red")


# ---- Training -----------------------------------------------------------------------------------


@cabvits
def test_a_training_step_reduces_the_loss(small):
    model = small(attn_drop=0.05, drop_path=0.05)
    x, y = torch.randn(8, *X[1:]), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

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
@cabvits
def test_checkpointing_gives_the_same_gradients_and_statistics(small, features_only, backend):
    options = {"attn_drop": 0.2, "drop_path": 0.2, "features_only": features_only}
    x, results, states = torch.randn(X), [], []
    fresh = small(backend=backend, **options)
    for checkpoint in (False, True):
        model = copy.deepcopy(fresh)
        model.checkpoint = checkpoint
        torch.manual_seed(3)
        results.append(gradients(model, x))
        states.append(dict(model.named_buffers()))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(norm.track_running_stats for norm in norms)
    for first, second in (results, states):
        for key in first:
            torch.testing.assert_close(first[key], second[key], msg=key)


@cabvits
@pytest.mark.parametrize("options", [{"attn_drop": 0.5}, {"drop_path": 0.6}], ids=str)
def test_dropout_follows_the_seed(small, options):
    model = small(**{"drop_path": 0.0, **options})
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
@cabvits
@pytest.mark.parametrize("options", [{}, {"attn_drop": 0.2, "drop_path": 0.2}], ids=["", "dropout"])
def test_backends_agree(small, features_only, options):
    models = [small(features_only=features_only, backend=b, **options) for b in BACKENDS]
    models[1].load_state_dict(models[0].state_dict())
    x, results = torch.randn(X), []
    for model in models:
        torch.manual_seed(5)
        results.append(gradients(model, x))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5, msg=key)


@backends
@kinds
@cabvits
def test_autocast_and_bfloat16(small, features_only, backend):
    model, x = small(features_only=features_only, backend=backend).eval(), torch.randn(X)
    exact = outputs(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs(model, x)
        loss_of(model, x).backward()
    half = outputs(copy.deepcopy(model).bfloat16(), x.bfloat16())
    for a, b, c in zip(exact, cast, half, strict=True):
        magnitude = a.abs().mean().item()
        assert (a - b).abs().mean().item() < 0.05 * magnitude
        assert (a - c).abs().mean().item() < 0.05 * magnitude


@backends
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda **o: small_cabvit(**o), id="hybrid"),
        pytest.param(lambda **o: small_cabvit(**o).eval(), id="hybrid-eval"),
        pytest.param(lambda **o: small_cabvit(checkpoint=True, **o), id="checkpoint"),
        pytest.param(lambda **o: small_plain_cabvit(**o), id="plain"),
        pytest.param(lambda **o: small_cabvit(attention="window", **ALONE, **o), id="window"),
        pytest.param(lambda **o: small_cabvit(tme=False, embed="patch", **o), id="no-tme"),
    ],
)
def test_the_model_compiles_in_one_graph(make, backend, fresh_compiler):
    model = make(backend=backend, drop_path=0.0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(X, requires_grad=True)
    ours = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
    plain = torch.autograd.grad(twin(x).square().sum(), [x, *twin.parameters()])
    pairs = zip((*ours, *model.buffers()), (*plain, *twin.buffers()), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@kinds
@cabvits
def test_export(small, features_only):
    model, x = small(features_only=features_only).eval(), torch.randn(X)
    exported = torch.export.export(model, (x,)).module()(x)
    exported = [exported] if torch.is_tensor(exported) else exported
    for a, b in zip(exported, outputs(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
