"""What tests/test_models.py knows of a family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from torch import nn

from support.models import (
    small_cabvit,
    small_cat,
    small_coat,
    small_crossvit,
    small_plain_cabvit,
)
from xattn_ops.models.cabvit import CabViT, PlainCabViT
from xattn_ops.models.cat import CAT
from xattn_ops.models.coat import CoaT
from xattn_ops.models.crossvit import CrossViT
from xattn_ops.models.crossvit_blocks import FUSIONS

Size = tuple[int, int]
option = pytest.param  # (options, id=...)


@dataclass(frozen=True)
class Small:
    """A small model, which trains in a moment. Options are those of `create_model`.

    Lists of options hold `option({...}, id=...)`.
    """

    build: Callable[..., nn.Module]  # of options -> a model for images of this size
    size: Size
    maps: Callable[[nn.Module, int, int], list[list[int]]]
    """Channels, rows and columns of the maps that the backbone gives for height and width."""
    sizes: list[Size]  # that it takes
    trains: list[Any]  # options under which every parameter learns
    dropout: list[dict[str, float]]  # options of which each alone drops something in training
    agree: list[Any]  # options under which the backends are compared
    compiled: list[Any]  # options that compile to other graphs
    any_size: bool = True  # the classifier takes all sizes, as the backbone
    idle: Callable[[str, nn.Module], bool] = lambda key, model: False
    """Whether a parameter's gradient is zero by nature."""


@dataclass(frozen=True)
class Family:
    """The models that are registered. A name with "_features" after it means the backbone."""

    classes: type | tuple[type, ...]
    names: list[str]
    goldens: list[str]  # those whose official outputs are recorded
    backbones: list[str]  # those whose official layouts are recorded, besides the classifiers
    sizes: list[tuple[str, int | Size]]  # img_size of a classifier that then takes such images
    wrong: list[tuple[str, dict[str, Any], str]]  # options that are refused, and the message
    small: dict[str, Small]
    unofficial: list[str] = field(default_factory=list)  # of the names; no official numbers
    unread: Callable[[nn.Module], int] = lambda model: 0
    """MACs of an official model on what nobody reads, which ours does not compute."""

    @property
    def official(self) -> list[str]:
        return [name for name in self.names if name not in self.unofficial]

    @property
    def layouts(self) -> list[str]:
        return self.official + self.backbones


WRONG: list[tuple[dict[str, Any], str]] = [  # of every family
    ({"drop_path": 1.0}, "drop path rate is 1"),
    ({"img_size": 0}, "img_size is 0"),
    ({"img_size": (3, 4, 5)}, "img_size is"),
    ({"num_classes": -1}, "num_classes is -1"),
    ({"backend": "quantum"}, "quantum"),
]


def halved(model: nn.Module, height: int, width: int, channels: list[int], least: int) -> list:
    """Maps of a quarter of each side, then of half the last one's; least: side of an image."""
    sides = [[-(-max(s, least) // (4 * 2**i)) for s in (height, width)] for i in range(4)]
    return [[c, *side] for c, side in zip(channels, sides, strict=True)]


CAT_FAMILY = Family(
    classes=CAT,
    names=["cat_tiny", "cat_small", "cat_base"],
    goldens=["cat_tiny", "cat_tiny_features"],
    backbones=["cat_tiny_features", "cat_small_features"],
    sizes=[("cat_tiny", size) for size in (224, 256, 97, (64, 160), (250, 100), 32)],
    wrong=[
        ("cat_tiny", {"patch_embed": "fold"}, "patch_embed is 'fold'; allowed are 'conv' and"),
        ("cat_tiny", {"cpsa_heads": "many"}, "cpsa_heads is 'many'"),
        ("cat_tiny", {"cpsa_heads": 5}, "num_heads"),
    ],
    small={
        "cat": Small(
            build=small_cat,
            size=(56, 56),
            maps=partial(halved, channels=[8, 16, 32, 64], least=1),
            sizes=[(97, 131), (225, 160), (56, 224), (33, 32), (4, 60), (1, 1)],
            any_size=False,
            trains=[
                option({"patch_embed": "slice"}, id="slice"),
                option({"cpsa_heads": "patch"}, id="multi-head"),
                option({"shift": True}, id="shift"),
                option({"ape": False}, id="no-ape"),
                option({"attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
                option({"mlp_ratio": 2.0, "num_classes": 0}, id="no-head"),
                option({"checkpoint": True}, id="checkpoint"),
                option({"cpsa_heads": 7, "depths": (2, 1)}, id="seven-heads"),
            ],
            dropout=[{"attn_drop": 0.3}, {"drop_path": 0.6}],
            agree=[
                option({}, id="plain"),
                option({"attn_drop": 0.2, "shift": True}, id="all"),
            ],
            compiled=[option({"depths": (1,), "shift": True}, id="shift")],
        )
    },
)


def small_coats(depth: int, **given: Any) -> Small:
    return Small(
        build=partial(small_coat, depth=depth),
        size=(64, 64),
        maps=lambda model, height, width: [
            [dim, *(max(s, 32) // (4 * 2**i) for s in (height, width))]
            for i, dim in enumerate(model.dims)
        ],
        sizes=[(97, 131), (63, 32), (33, 70), (31, 225), (1, 1)],
        dropout=[{"drop": 0.3}, {"drop_path": 0.6}],
        **given,
    )


COAT_FAMILY = Family(
    classes=CoaT,
    names=[
        *(f"coat_lite_{size}" for size in ("tiny", "mini", "small", "medium")),
        *(f"coat_{size}" for size in ("tiny", "mini", "small")),
    ],
    goldens=["coat_lite_tiny", "coat_tiny", "coat_lite_tiny_features"],
    backbones=["coat_lite_tiny_features", "coat_mini_features"],
    sizes=[
        (name, size) for name in ("coat_lite_tiny", "coat_tiny") for size in (224, 97, (64, 160), 8)
    ],
    wrong=[
        ("coat_tiny", {"co_scale": "sum"}, "co_scale is 'sum'; allowed are interpolation, direct"),
        ("coat_lite_tiny", {"co_scale": "none"}, "CoaT-Lite has no parallel group"),
        ("coat_tiny", {"drop": -0.1}, "must be in"),
    ],
    small={
        "lite": small_coats(
            0,
            trains=[
                option({}, id="plain"),
                option({"conv_position": False}, id="no-position"),
                option({"conv_relative": False}, id="no-relative"),
                option({"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
            ],
            agree=[option({}, id="plain")],
            compiled=[],
        ),
        "coat": small_coats(
            2,
            trains=[
                option({}, id="plain"),
                option({"conv_position": False, "conv_relative": False}, id="no-encodings"),
                option({"co_scale": "direct"}, id="direct"),
                option({"co_scale": "direct", "conv_relative": False}, id="direct-no-relative"),
                option({"co_scale": "none"}, id="no-co-scale"),
                option({"drop": 0.2, "drop_path": 0.3}, id="dropout"),
                option({"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
            ],
            agree=[
                option({"drop": 0.2, "drop_path": 0.2}, id="dropout"),
                option({"co_scale": "direct"}, id="direct"),
            ],
            compiled=[
                option({"depth": 1, "co_scale": "interpolation"}, id="interpolation"),
                option({"depth": 1, "co_scale": "direct"}, id="direct"),
            ],
        ),
    },
)


def crossvit_maps(model: nn.Module, height: int, width: int) -> list[list[int]]:
    grids = model.grids_of(height, width)  # test_models_crossvit.py says which these are
    return [[dim, *grid] for dim, grid in zip(model.dims, grids, strict=True)]


CROSSVIT_OPTIONS: dict[str, dict[str, Any]] = {
    **{fusion: {"fusion": fusion} for fusion in FUSIONS},
    "fusion-depth": {"fusion_depth": 3},
    "equal-widths": {"dims": (8, 8)},
    "deep-small-branch": {"depths": (3, 1)},
    "patches": {"patches": (8, 16)},
    "one-stage-checkpoint": {"stages": 1, "checkpoint": True},
    "conv": {"tokenizer": "conv"},
    "t2t": {"tokenizer": "t2t"},
    "dropout": {"drop": 0.2, "attn_drop": 0.2, "drop_path": 0.3},
    "no-head": {"num_classes": 0},
}

CROSSVIT_FAMILY = Family(
    classes=CrossViT,
    names=[
        *(f"crossvit_{name}" for name in ("tiny", "small", "base", "9", "15", "18")),
        *(f"crossvit_{name}_dagger" for name in ("9", "15", "18")),
        *(f"crossvit_{name}_dagger_384" for name in ("15", "18")),
    ],
    goldens=["crossvit_small", "crossvit_9", "crossvit_9_dagger"],
    backbones=[],
    sizes=[("crossvit_tiny", size) for size in (224, 97, (64, 160), 8)],
    wrong=[
        ("crossvit_9", options, message)
        for options, message in [
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
            ({"attn_drop": 1.0}, "attn_drop must be in"),
        ]
    ],
    small={
        "crossvit": Small(
            build=partial(small_crossvit, drop_path=0.0),
            size=(64, 96),
            maps=crossvit_maps,
            sizes=[(64, 96), (97, 131), (40, 200), (16, 11), (1, 1)],
            trains=[
                option({**options, "cls_token": cls_token}, id=f"{id}-{tokens}")
                for tokens, cls_token in (("cls", True), ("no-cls", False))
                for id, options in CROSSVIT_OPTIONS.items()
            ],
            dropout=[{"drop": 0.3}, {"attn_drop": 0.5}, {"drop_path": 0.6}],
            agree=[
                option({}, id="plain"),
                option({"cls_token": False}, id="no-cls"),
                option({"fusion_depth": 2}, id="fusion-depth"),
                option({"drop": 0.2, "drop_path": 0.2}, id="dropout"),
            ],
            compiled=[option({"fusion": fusion}, id=fusion) for fusion in FUSIONS],
            idle=lambda key, model: "wk.bias" in key,  # softmax does not see a shift
        )
    },
)

ALONE = {"digests": False, "tme": False}
CABVIT_OPTIONS = [
    option({}, id="all"),
    option({"digest_scale": False}, id="no-scale"),
    option({"tme": False}, id="no-tme"),
    option({"digests": False}, id="no-digests"),
    option(ALONE, id="global"),
    option({"attn_drop": 0.2, "drop_path": 0.3}, id="dropout"),
    option({"num_classes": 0, "checkpoint": True}, id="no-head-checkpoint"),
]
CABVIT_AGREE = [option({}, id="all"), option({"attn_drop": 0.2, "drop_path": 0.2}, id="dropout")]
CABVIT_DROPOUT = [{"attn_drop": 0.5}, {"drop_path": 0.6}]


def queries_of_digests(model: nn.Module) -> int:
    blocks = [block for blocks in model.cab_stages.values() for block in blocks]
    return sum(block.num_digests * block.qkv.in_features**2 for block in blocks)


CABVIT_FAMILY = Family(
    classes=(CabViT, PlainCabViT),
    names=["cabvit_h_l1", "cabvit_h_l2", "cabvit_h_l3", "cabvit_p_l0"],
    unofficial=["cabvit_p_l0"],
    goldens=["cabvit_h_l1"],
    backbones=[],
    sizes=[("cabvit_h_l1", size) for size in (256, 97, (64, 160))] + [("cabvit_p_l0", (80, 33))],
    wrong=[
        ("cabvit_h_l1", {"attention": "sparse"}, "attention is 'sparse'; allowed are global, win"),
        ("cabvit_h_l1", {"embed": "linear"}, "embed is 'linear'; allowed are conv, patch"),
        ("cabvit_h_l1", {"attention": "window"}, "attention is 'window'; digests and tme go with"),
        ("cabvit_h_l1", {"head_dim": 48}, "head_dim must divide the channels of stages 3 and 4"),
        ("cabvit_p_l0", {"heads": 5}, "heads must divide dim, 192, got 5"),
        ("cabvit_h_l1", {"attn_drop": -0.1}, "attn_drop must be in"),
    ],
    unread=queries_of_digests,
    small={
        "cabvit": Small(
            build=partial(small_cabvit, drop_path=0.0),
            size=(64, 96),
            maps=partial(halved, channels=[8, 8, 8, 16], least=1),
            sizes=[(64, 96), (97, 131), (40, 200), (31, 33), (1, 1)],
            trains=[
                *CABVIT_OPTIONS,
                option({**ALONE, "attention": "window"}, id="window"),
                option({**ALONE, "attention": "none"}, id="convnext"),
                option({"embed": "patch"}, id="patch"),
                option({"mlp_ratio": 2.0, "layer_scale": 1.0}, id="ratio"),
            ],
            dropout=CABVIT_DROPOUT,
            agree=CABVIT_AGREE,
            compiled=[
                option({"depths": (1, 1, 2, 1)}, id="all"),
                option({"depths": (1, 1, 2, 1), "checkpoint": True}, id="checkpoint"),
                option({**ALONE, "attention": "window"}, id="window"),
                option({"depths": (1, 1, 2, 1), "tme": False, "embed": "patch"}, id="no-tme"),
            ],
        ),
        "plain-cabvit": Small(
            build=partial(small_plain_cabvit, drop_path=0.0),
            size=(64, 96),
            maps=lambda model, height, width: [
                [16, *(max(side // model.patch, 1) for side in (height, width))]
            ],
            sizes=[(64, 96), (97, 131), (40, 200), (7, 1)],
            trains=[*CABVIT_OPTIONS, option({"pos_embed": False}, id="no-positions")],
            dropout=CABVIT_DROPOUT,
            agree=CABVIT_AGREE,
            compiled=[option({}, id="plain")],
            # what changes the patches of the last block alone is nothing to a head that reads CLS
            idle=lambda key, model: (
                not model.features_only
                and key.startswith(("blocks.2.attention_biases", "blocks.2.local_conv"))
            ),
        ),
    },
)

FAMILIES = [CABVIT_FAMILY, CAT_FAMILY, COAT_FAMILY, CROSSVIT_FAMILY]
SMALL = {name: small for family in FAMILIES for name, small in family.small.items()}


def of(field: str) -> pytest.MarkDecorator:
    """A test of (small, options): for each small model, each of the options in this field."""
    return pytest.mark.parametrize(
        ("small", "options"),
        [
            pytest.param(small, *given.values, id=f"{name}-{given.id}")
            for name, small in SMALL.items()
            for given in getattr(small, field)
        ],
    )


def named(field: str) -> pytest.MarkDecorator:
    """A test of name: for each model name in this field of a family."""
    names = [name for family in FAMILIES for name in getattr(family, field)]
    return pytest.mark.parametrize("name", names)


def built(name: str, create: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """What `create` makes of a name; the backbone where it ends in "_features"."""
    base = name.removesuffix("_features")
    return create(base, features_only=name != base, **options)
