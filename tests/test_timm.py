"""timm's models with our operators inside: the same numbers, and nothing else changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support.cases import backends
from support.timm import (
    SMALL,
    assert_near,
    assert_same_logits,
    contents,
    families,
    image_for,
    small,
)
from support.timm import timm as timm_package
from timm.models.crossvit import CrossAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from xattn_ops.integrations import _timm_modules
from xattn_ops.integrations.timm import patch, unpatch

REPLACED = {  # small model -> how many modules of which operator
    "crossvit": {"cls_cross_attention": 4},
    "coat": {"conv_relative_attention": 11, "conv_position_encoding": 4},
    "coat_lite": {"conv_relative_attention": 5, "conv_position_encoding": 4},
    "swin": {"inner_patch_attention": 4},
}


def counted(report: Any) -> dict[str, int]:
    operators = list(report.replaced.values())
    return {operator: operators.count(operator) for operator in dict.fromkeys(operators)}


# ---- The same numbers ----------------------------------------------------------------------------


@backends
@families
def test_logits_are_the_same(family, backend):
    model = small(family).eval()
    assert_same_logits(model, image_for(model), backend)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        pytest.param("crossvit_9_dagger_240", 6, id="crossvit"),
        pytest.param("coat_lite_tiny", 12, id="coat-lite"),
        pytest.param("swin_tiny_patch4_window7_224", 12, id="swin"),
    ],
)
def test_registered_models(name, modules):
    model = timm_package.create_model(name, num_classes=7).eval()
    x = image_for(model, batch=1)
    with torch.no_grad():
        expected = model(x)
        report = patch(model)
        assert_near(model(x), expected)
    assert (len(report.replaced), report.refused) == (modules, {})


@pytest.mark.parametrize(
    "name",
    [
        name
        for kind in ("crossvit_*", "coat_*", "swin_*")
        for name in timm_package.list_models(kind)
    ],
)
def test_every_registered_model_is_replaced_entirely(name):
    with torch.device("meta"):
        model = timm_package.create_model(name)
    report = patch(model)
    kinds = (CrossAttention, WindowAttention, _timm_modules.FactorAttnConvRelPosEnc)
    known = [m for m in model.modules() if isinstance(m, (*kinds, _timm_modules.ConvPosEnc))]
    assert len(report.replaced) == len(known) > 0
    assert report.refused == {}
    assert all(type(module) in _timm_modules.TIMMS for module in known)


def training_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Loss, the gradient of the image and of every parameter, and the weights after a step."""
    torch.manual_seed(5)  # the same paths and elements are dropped
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    loss.backward()
    result = {"loss": loss.detach(), "image": x.grad}
    result |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    optimizer.step()
    return result | {f"{name} after": p.detach() for name, p in model.named_parameters()}


@backends
@families
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=["f32", "f64"]
)
def test_a_training_step_is_the_same(family, dtype, tolerance, backend):
    # Swin's dropout draws in the order of the windows in timm, and of the map in ours
    drop = {} if family == "swin" else {"proj_drop_rate": 0.2}
    model = small(family, drop_path_rate=0.3, **drop).to(dtype).train()
    patched, x = copy.deepcopy(model), image_for(model, 4).to(dtype)
    patch(patched, backend=backend)
    expected, got = training_step(model, x), training_step(patched, x)
    largest = max(t.abs().max().item() for name, t in expected.items() if "gradient" in name)
    for name, tensor in expected.items():
        # wk.bias changes nothing: its gradient is rounding in timm, and zero here
        scale = largest if "wk.bias" in name else tensor.abs().max().item()
        assert (got[name] - tensor).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("family", ["crossvit", "swin"])
def test_dropout_of_attention_weights(family):
    """In training alone, reproducible, and switched off with the Dropout module itself."""
    model = small(family)
    attentions = [model.get_submodule(name) for name in patch(model).replaced]
    for attention in attentions:
        attention.attn_drop = nn.Dropout(0.4)
    x, outs = image_for(model), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(x))
    torch.testing.assert_close(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-3
    for attention in attentions:
        attention.attn_drop.eval()
    torch.testing.assert_close(model(x), model.eval()(x))


@pytest.mark.parametrize(
    ("side", "options"),
    [
        pytest.param((32, 32), {"window_size": 3}, id="indivisible"),
        pytest.param((44, 20), {"img_size": (44, 20)}, id="rectangular-image"),
        pytest.param((36, 52), {"img_size": (36, 52), "window_size": (3, 5)}, id="both"),
        pytest.param((32, 32), {"window_size": 7}, id="window-cut-to-the-map"),
        pytest.param((32, 32), {"window_size": 7, "always_partition": True}, id="window-beyond"),
        pytest.param((40, 40), {"strict_img_size": False}, id="dynamic"),
        pytest.param((52, 28), {"strict_img_size": False}, id="dynamic-indivisible"),
        pytest.param((12, 60), {"strict_img_size": False}, id="dynamic-narrower-than-a-window"),
        pytest.param((4, 8), {"strict_img_size": False}, id="dynamic-narrower-than-the-shift"),
        pytest.param((32, 32), {"dynamic_img_size": True, "window_size": (8, 3)}, id="one-shift"),
        pytest.param((32, 32), {"qkv_bias": False, "window_size": 3}, id="no-qkv-bias"),
        pytest.param((32, 32), {"head_dim": 5}, id="head-dim"),
        pytest.param((32, 32), {"window_size": (3, 7), "depths": (3, 1)}, id="odd-depth"),
    ],
)
def test_swin_on_images_and_windows_of_any_size(side, options):
    model = small("swin", **options).eval()
    x = torch.randn(2, 3, *side)
    assert_same_logits(model, x)
    twin = copy.deepcopy(model)
    patch(twin)
    grads = [torch.autograd.grad(one(x).sum(), list(one.parameters())) for one in (model, twin)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("crossvit", {"multi_conv": True}, id="dagger"),
        pytest.param("crossvit", {"qkv_bias": False}, id="no-qkv-bias"),
        pytest.param("crossvit", {"img_size": (60, 96)}, id="rectangular-image"),
        pytest.param("crossvit", {"depth": ((1, 2, 2),)}, id="fusions-in-a-row"),
        pytest.param("crossvit", {"global_pool": "avg"}, id="mean-pooling"),
        pytest.param("coat", {"img_size": (32, 96)}, id="rectangular-image"),
        pytest.param("coat", {"crpe_window": {3: 4, 9: 4}}, id="other-windows"),
        pytest.param("coat_lite", {"qkv_bias": False}, id="no-qkv-bias"),
        pytest.param("coat_lite", {"img_size": 224}, id="large"),
    ],
)
def test_options_of_crossvit_and_coat(family, options):
    model = small(family, **options).eval().double()
    assert_same_logits(model, image_for(model).double())


def test_swin_goes_on_after_a_change_of_its_input_size():
    model = small("swin").eval()
    patch(model)
    model.set_input_size((40, 56), window_size=(5, 3))
    x = torch.randn(2, 3, 40, 56)
    patched = model(x)
    unpatch(model)
    assert_near(patched, model(x))


def test_swin_with_timms_own_fused_attention():
    """Its call of scaled_dot_product_attention leaves self.scale aside; so do we then."""
    model = small("swin").eval()
    for fused in (True, False):
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.fused_attn, module.scale = fused, 0.1
        assert_same_logits(model, image_for(model))


def test_gradient_checkpointing():
    model = small("swin").train()
    patch(model)
    x = image_for(model)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close(again, plain)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(family, dtype):
    model = SMALL[family]().to(dtype).eval()
    x = image_for(model).to(dtype)
    expected = model(x)
    patch(model)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(x), expected, **tolerance)


@families
def test_autocast(family):
    model = SMALL[family]().eval()
    x = image_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        patch(model)
        got = model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


# ---- What a user does with a model ---------------------------------------------------------------


@families
def test_patch_changes_classes_alone_and_unpatch_gives_them_back(family):
    model = small(family)
    before, x = contents(model), image_for(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    expected = model.eval()(x)
    model.train()
    report = patch(model)
    assert counted(report) == REPLACED[family]
    assert report.refused == {}
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == tensors.keys()
    assert all(now[name] is tensor for name, tensor in tensors.items())
    changed = [name for name, (kind, _) in contents(model).items() if kind is not before[name][0]]
    assert set(report.replaced) <= set(changed)
    for name in changed:
        assert issubclass(type(model.get_submodule(name)), before[name][0])
    assert unpatch(model) == list(report.replaced)
    assert contents(model) == before
    assert_near(model.eval()(x), expected)
    assert unpatch(model) == []


@families
def test_state_dicts_go_both_ways(family):
    model, other = small(family).eval(), SMALL[family]().eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    patch(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    other.load_state_dict(model.state_dict())
    x = image_for(model)
    assert_near(other(x), model(x))
    fresh = SMALL[family]().eval()
    patch(fresh)
    fresh.load_state_dict(state)
    assert_near(fresh(x), model(x))


@families
def test_deepcopy_and_pickle(family):
    model = small(family).eval()
    patch(model, backend="reference")
    x = image_for(model)
    with torch.no_grad():
        model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert_near(other(x), model(x))
            kinds = [type(m) for m in other.modules()]
            assert kinds == [type(m) for m in model.modules()]
            assert unpatch(other) == list(patch(model).replaced)


@pytest.mark.usefixtures("fresh_compiler")
@families
def test_compile_without_graph_breaks(family):
    model = small(family).eval()
    patch(model)
    x = image_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), model(x))
    grads = [
        torch.autograd.grad(one(x).sum(), list(model.parameters())) for one in (model, compiled)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@families
def test_export(family):
    model = small(family).eval()
    patch(model)
    x = image_for(model)
    program = torch.export.export(model, (x,))
    assert_near(program.module()(x), model(x))


@families
def test_weights_changed_after_patching_count(family):
    """An optimizer made before goes on, and no copy of a weight is kept for inference."""
    model = small(family).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    patch(model)
    x = image_for(model, 8)
    with torch.no_grad():
        before = model(x)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = model(x)
        unpatch(model)
        torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_patching_again_changes_the_backend():
    model = small("crossvit").eval()
    first = patch(model)
    assert patch(model, backend="reference") == first
    assert model.blocks[0].fusion[0].attn.backend == "reference"


@families
def test_the_backend_reaches_the_operators(family):
    model = small(family).eval()
    patch(model, backend="cuda")
    with pytest.raises(ValueError, match="'cuda' cannot serve"):
        model(image_for(model))


def test_a_part_of_a_larger_model():
    net = nn.ModuleDict({"backbone": small("swin"), "head": nn.Linear(5, 2)})
    report = patch(net)
    assert next(iter(report.replaced)) == "backbone.layers.0.blocks.0.attn"
    assert str(report).splitlines()[0] == "backbone.layers.0.blocks.0.attn: inner_patch_attention"
    features = timm_package.create_model("swin_tiny_patch4_window7_224", features_only=True)
    assert len(patch(features).replaced) == 12
