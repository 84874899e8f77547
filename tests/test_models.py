"""What holds for every family of models: the official numbers, and all that a user does with one.

A family is described in tests/support/families.py; what is particular to one stands in
tests/test_models_<family>.py, the figures of its paper in tests/test_models_<family>_paper.py.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from goldens import INDEX, facts, golden, image, layout, official_state, shared
from support.cases import BACKENDS, assert_same, backends, native
from support.families import FAMILIES, SMALL, WRONG, Size, Small, built, named, of
from support.models import gradients, kinds, loss_of, on_meta, outputs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn_ops import flops
from xattn_ops.models import create_model, list_models, load_official

smalls = pytest.mark.parametrize("small", [pytest.param(s, id=id) for id, s in SMALL.items()])


def images(small: Small, count: int = 2, **options: bool) -> Tensor:
    return torch.randn(count, 3, *small.size, **options)


def shapes_of(small: Small, model: nn.Module, size: Size, features_only: bool) -> list[list[int]]:
    """Of what the model gives for each image: its maps, or five logits."""
    return small.maps(model, *size) if features_only else [[5]]


# ---- The official numbers -----------------------------------------------------------------------


last_state = lru_cache(maxsize=1)(official_state)  # half of a test's time


@backends
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=["float64", "float32", "bfloat16"],
)
@named("goldens")  # the last one changes last
@torch.no_grad()
def test_goldens(name: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    model = built(name, create_model, backend=backend).to(dtype).eval()
    assert load_official(model, last_state(name)) == ([], [])
    x = image(1, 192, 256) if name.endswith("_features") else image(2, 224, 224)
    for y, official in zip(outputs(model, x.to(dtype)), golden(name), strict=True):
        assert y.dtype == dtype
        assert official.error(y) < tolerance


@named("official")
def test_parameters_and_macs_equal_the_official_ones(name: str) -> None:
    """But for what nobody reads of an official model's."""
    (family,) = (family for family in FAMILIES if name in family.names)
    model, side = on_meta(name, backend="reference"), facts(name)["input"]
    assert sum(p.numel() for p in model.parameters()) == facts(name)["params"]
    macs = flops.count(model, (1, 3, side, side))[""] + family.unread(model)
    assert macs / 1e9 == pytest.approx(facts(name)["gmacs"], abs=6e-5)


@smalls
def test_macs_are_the_same_with_the_kernels(small: Small) -> None:
    """Another op counts there than on meta."""
    shape = (1, 3, *small.size)
    counts = {flops.count(small.build(backend=backend), shape)[""] for backend in BACKENDS}
    with torch.device("meta"):
        counts.add(flops.count(small.build(backend="reference"), shape)[""])
    assert len(counts) == 1


@named("layouts")
def test_state_has_the_official_layout(name: str) -> None:
    model = built(name, on_meta)
    expected = {key: shape for key, shape in layout(name).items() if not key.endswith(INDEX)}
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == expected
    own = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in own.values()}) == len(own) - len(shared(name))
    for key, first in shared(name).items():
        assert own[key] is own[first], key


@kinds
@smalls
def test_state_dict_round_trip(small: Small, features_only: bool, tmp_path) -> None:
    model = small.build(features_only=features_only)
    model(images(small))  # statistics of its own, where a norm keeps them
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = small.build(features_only=features_only).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = images(small, 1)
    for a, b in zip(outputs(model.eval(), x), outputs(other, x), strict=True):
        assert torch.equal(a, b)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert len(list(model.buffers())) == sum(len(list(norm.buffers())) for norm in norms)


@named("names")
def test_names(name: str) -> None:
    (family,) = (family for family in FAMILIES if name in family.names)
    assert name in list_models()
    assert isinstance(on_meta(f"{name}_224"), family.classes)
    with pytest.raises(ValueError, match=rf"unknown model '{name}q'; did you mean {name}"):
        create_model(f"{name}q")
    with pytest.raises(TypeError, match="colour"):
        create_model(name, colour="red")


def test_every_model_is_tested() -> None:
    assert list_models() == sorted(name for family in FAMILIES for name in family.names)


# ---- Sizes --------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    ("small", "features_only", "size"),
    [
        pytest.param(small, kind, size, id=f"{name}-{size[0]}x{size[1]}-{kind * 'features'}")
        for name, small in SMALL.items()
        for kind in ((False, True) if small.any_size else (True,))
        for size in small.sizes
    ],
)
def test_images_of_any_size(small: Small, features_only: bool, size: Size, backend: str) -> None:
    model = small.build(features_only=features_only, backend=backend).eval()
    x = torch.randn(2, 3, *size)
    ys = outputs(model, x)
    shapes = shapes_of(small, model, size, features_only)
    assert [list(y.shape) for y in ys] == [[2, *shape] for shape in shapes]
    assert all(y.isfinite().all() for y in ys)
    for key, grad in gradients(model, x).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key


@pytest.mark.parametrize(("name", "size"), [given for family in FAMILIES for given in family.sizes])
@torch.no_grad()
def test_classifier_made_for_a_size(name: str, size: int | Size) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    model = create_model(name, num_classes=7, img_size=size).eval()
    y = model(torch.randn(1, 3, height, width))
    assert y.shape == (1, 7)
    assert y.isfinite().all()


@kinds
@smalls
def test_empty_batch(small: Small, features_only: bool) -> None:
    model = small.build(features_only=features_only).eval()
    shapes = shapes_of(small, model, small.size, features_only)
    assert [list(y.shape) for y in outputs(model, images(small, 0))] == [[0, *s] for s in shapes]


@kinds
@smalls
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"image is \[3, 64, 64\]; it must be \[B, 3, H, W\]"),
        ((1, 4, 64, 64), r"\[1, 4, 64, 64\]"),
        ((1, 3, 0, 8), "sides must be at least 1"),
    ],
)
def test_bad_images(small: Small, features_only: bool, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.build(features_only=features_only)(torch.ones(shape))


# ---- Options ------------------------------------------------------------------------------------


@backends
@kinds
@of("trains")
def test_options_train(small: Small, options: dict, features_only: bool, backend: str) -> None:
    model = small.build(features_only=features_only, backend=backend, **options)
    for key, grad in gradients(model, images(small)).items():
        assert grad is not None, key
        assert grad.isfinite().all(), key
        dropped = options.get("drop_path") and "blocks" in key
        assert grad.abs().max() > 0 or dropped or small.idle(key, model), key


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(given for family in FAMILIES for given in family.wrong),
        *((family.names[0], *given) for family in FAMILIES for given in WRONG),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"img_size": 32, **options})(torch.randn(2, 3, 32, 32))


# ---- Training -----------------------------------------------------------------------------------


@smalls
def test_a_training_step_reduces_the_loss(small: Small) -> None:
    model = small.build(**dict.fromkeys(dropout_options(small), 0.05))
    x, y = images(small, 8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


def dropout_options(small: Small) -> list[str]:
    return [name for options in small.dropout for name in options]


@backends
@kinds
@smalls
def test_checkpointing_gives_the_same_gradients(
    small: Small, features_only: bool, backend: str
) -> None:
    """And the same running statistics, where there are some."""
    options = dict.fromkeys(dropout_options(small), 0.2)
    fresh = small.build(features_only=features_only, backend=backend, **options)
    x, results = images(small), []
    for checkpoint in (False, True):
        model = copy.deepcopy(fresh)
        stages = [module for module in model.modules() if hasattr(module, "checkpoint")]
        assert stages
        for stage in stages:
            stage.checkpoint = checkpoint
        torch.manual_seed(3)
        results.append(gradients(model, x) | dict(model.named_buffers()))
    assert_same(*results)


@backends
@pytest.mark.parametrize(
    ("small", "options"),
    [
        pytest.param(small, options, id=f"{name}-{next(iter(options))}")
        for name, small in SMALL.items()
        for options in small.dropout
    ],
)
def test_dropout_follows_the_seed(small: Small, options: dict[str, float], backend: str) -> None:
    model, x = small.build(backend=backend, **options), images(small, 4)

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
@of("agree")
def test_backends_agree(small: Small, options: dict, features_only: bool) -> None:
    models = [small.build(features_only=features_only, backend=b, **options) for b in BACKENDS]
    models[1].load_state_dict(models[0].state_dict())
    x, results = images(small), []
    for model in models:
        torch.manual_seed(5)
        loss = {"loss": loss_of(model, x).detach()}
        torch.manual_seed(5)
        results.append(loss | gradients(model, x))
    assert_same(*results, rtol=1e-3, atol=1e-5)


@backends
@kinds
@smalls
def test_autocast_and_bfloat16(small: Small, features_only: bool, backend: str) -> None:
    model, x = small.build(features_only=features_only, backend=backend).eval(), images(small)
    exact = outputs(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs(model, x)
        loss_of(model, x).backward()
    half = outputs(copy.deepcopy(model).bfloat16(), x.bfloat16())
    for a, b, c in zip(exact, cast, half, strict=True):
        magnitude = a.abs().mean().item()
        assert (a - b).abs().mean().item() < 0.05 * magnitude
        assert (a - c).abs().mean().item() < 0.05 * magnitude


@pytest.mark.usefixtures("fresh_compiler")
@of("compiled")
def test_the_model_compiles_in_one_graph(small: Small, options: dict) -> None:
    """With what a user gets here; the operators compile on each backend in test_compile."""
    model, x = small.build(**options), images(small, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = [x, *(p for p in model.parameters() if p.requires_grad)]
    got = torch.autograd.grad(compiled(x).square().sum(), weights)
    want = torch.autograd.grad(model(x).square().sum(), weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@kinds
@smalls
def test_export(small: Small, features_only: bool) -> None:
    model, x = small.build(features_only=features_only).eval(), images(small)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(outputs(exported, x), outputs(model, x), rtol=1e-4, atol=1e-4)
