"""load_official: which checkpoints it takes, and what it says to the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import INDEX, official_state
from support.models import check_misfit, small_coat
from torch import Tensor, nn

from xattn_ops.models import create_model, load_official


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state("cat_tiny")


@pytest.fixture
def tiny() -> nn.Module:
    return create_model("cat_tiny")


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda s: {"state_dict": s, "epoch": 3}, id="state_dict"),
        pytest.param(lambda s: {"model": s}, id="model"),
        pytest.param(lambda s: {f"module.{k}": v for k, v in s.items()}, id="module-prefix"),
        pytest.param(lambda s: {k: v.half() for k, v in s.items() if INDEX not in k}, id="half"),
    ],
)
def test_checkpoint_forms(tiny, state, wrap):
    assert load_official(tiny, wrap(state)) == ([], [])
    weight = tiny.head.weight
    torch.testing.assert_close(weight, state["head.weight"].to(weight), rtol=1e-3, atol=1e-3)


def test_classifier_checkpoint_in_a_backbone(state):
    model = create_model("cat_tiny", features_only=True)
    report = load_official(model, state)
    assert report.ignored == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert report.kept == [f"norm{i}.{kind}" for i in range(4) for kind in ("bias", "weight")]
    grid = model.ape.flatten(2).transpose(1, 2)
    torch.testing.assert_close(grid, state["ape"].to(grid))
    assert model.layers[0].post_ipsa_blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_position_embedding_is_resized(state):
    model = create_model("cat_tiny", img_size=(256, 448))
    load_official(model, state)
    grid = state["ape"].unflatten(1, (56, 56)).permute(0, 3, 1, 2).float()
    expected = F.interpolate(grid, size=(64, 112), mode="bicubic", align_corners=False)
    ours = model.ape.unflatten(1, (64, 112)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, expected)


def test_backbone_layout_of_ape_in_a_classifier(tiny, state):
    grid = state["ape"].unflatten(1, (56, 56)).permute(0, 3, 1, 2)
    load_official(tiny, {**state, "ape": grid})
    torch.testing.assert_close(tiny.ape, state["ape"].to(tiny.ape))


KEY = "layers.2.cpsa_blocks.1.attn.qkv.weight"
TABLE_INDEX = f"layers.0.pre_ipsa_blocks.0.attn{INDEX}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s.pop(KEY), f"missing: {KEY}$", id="missing"),
        pytest.param(lambda s: s.update(extra=s[KEY]), "unexpected: extra$", id="unexpected"),
        pytest.param(
            lambda s: s.update({KEY: torch.ones(3, 49)}),
            rf"misshaped: {KEY} \(checkpoint \[3, 49\], model \[147, 49\]\)$",
            id="misshaped",
        ),
        pytest.param(
            lambda s: (s.pop(KEY), s.update(extra=s["ape"])),
            f"missing: {KEY}; unexpected: extra$",
            id="both",
        ),
        pytest.param(
            lambda s: s.update(ape=torch.ones(1, 3000, 64)),
            r"ape \(checkpoint \[1, 3000, 64\], model \[1, 3136, 64\]\)",
            id="ape-not-square",
        ),
        pytest.param(
            lambda s: s.update(ape=torch.ones(1, 3136, 96)),
            r"ape \(checkpoint \[1, 3136, 96\], model \[1, 3136, 64\]\)",
            id="ape-width",
        ),
        pytest.param(
            lambda s: s.update(ape=torch.ones(3)), r"ape \(checkpoint \[3\]", id="ape-rank"
        ),
        pytest.param(
            lambda s: s.update({TABLE_INDEX: s[TABLE_INDEX].t()}),
            "pre_ipsa_blocks.0.attn.relative_position_index does not hold CAT's",
            id="index",
        ),
    ],
)
def test_misfits_are_named_and_change_nothing(tiny, state, change, message):
    check_misfit(tiny, state, change, message)


def test_backbone_checkpoint_in_a_classifier_is_refused(tiny):
    with pytest.raises(ValueError, match=r"missing: head\.bias.*unexpected: norm0\.bias"):
        load_official(tiny, official_state("cat_tiny_features"))


@pytest.mark.parametrize(
    "checkpoint", [[1, 2], {"a": 1}, {3: torch.ones(1)}, {"model": {"a": "b"}}]
)
def test_checkpoints_without_tensors(tiny, checkpoint):
    with pytest.raises(TypeError, match="state_dict"):
        load_official(tiny, checkpoint)


def test_foreign_models_are_refused(state):
    with pytest.raises(TypeError, match="Linear is not a model of this library"):
        load_official(nn.Linear(2, 2), state)


# ---- Tensors that stand under several keys ------------------------------------------------------

OWNER, ALIAS = "cpe2.proj.weight", "serial_blocks2.0.cpe.proj.weight"


@pytest.fixture
def coat_state() -> dict[str, Tensor]:
    return small_coat().state_dict()


@pytest.mark.parametrize("gone", [OWNER, ALIAS])
def test_a_shared_tensor_may_stand_under_any_of_its_keys(coat_state, gone):
    """Formats that store each tensor once keep one of its keys."""
    model = small_coat()
    del coat_state[gone]
    assert load_official(model, coat_state) == ([], [])
    assert torch.equal(model.cpe2.proj.weight, coat_state[ALIAS if gone == OWNER else OWNER])
    assert model.serial_blocks2[0].cpe is model.cpe2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: s.update({ALIAS: s[ALIAS] + 1}),
            f"different values of one tensor: {OWNER} = {ALIAS}$",
            id="different",
        ),
        pytest.param(
            lambda s: (s.pop(OWNER), s.pop(ALIAS)), f"missing: {OWNER}, {ALIAS}$", id="both-missing"
        ),
        pytest.param(
            lambda s: s.update({ALIAS: torch.ones(16, 1, 5, 5)}),
            rf"misshaped: {ALIAS} \(checkpoint \[16, 1, 5, 5\], model \[16, 1, 3, 3\]\)$",
            id="misshaped",
        ),
        pytest.param(lambda s: s.pop("aggregate.bias"), "missing: aggregate.bias$", id="missing"),
        pytest.param(
            lambda s: s.update(extra=torch.ones(1)), "unexpected: extra$", id="unexpected"
        ),
    ],
)
def test_misfits_of_shared_tensors_are_named_and_change_nothing(coat_state, change, message):
    check_misfit(small_coat(), coat_state, change, message)


@pytest.mark.parametrize("depth", [0, 2], ids=["lite", "coat"])
def test_coat_classifier_in_a_backbone(depth):
    classifier, backbone = small_coat(depth), small_coat(depth, features_only=True)
    report = load_official(backbone, classifier.state_dict())
    assert report.kept == []
    assert {key.split(".")[0] for key in report.ignored} == {
        "norm1", "norm2", "norm3", "norm4", "head", *(["aggregate"] if depth else [])
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"missing: .*head\.bias"):
        load_official(classifier, backbone.state_dict())


def test_a_checkpoint_with_encodings_does_not_fit_a_model_without(coat_state):
    with pytest.raises(ValueError, match=r"unexpected: cpe1\.proj\.bias"):
        load_official(small_coat(conv_position=False), coat_state)
