"""Small models of every family, and what the tests do with a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.cases import Tensors
from xattn_ops.models import create_model, load_official
from xattn_ops.models.cabvit import CabViT, PlainCabViT
from xattn_ops.models.cat import CAT
from xattn_ops.models.coat import CoaT
from xattn_ops.models.crossvit import CrossViT

kinds = pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])


def on_meta(name: str, **options: Any) -> nn.Module:
    """A model without memory: its shapes, its keys, its MACs."""
    with torch.device("meta"):
        return create_model(name, **options)


def outputs(model: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """A classifier's logits or a backbone's maps, as a list."""
    y = model(x)
    return [y] if torch.is_tensor(y) else y


def loss_of(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    return torch.stack([y.square().mean() for y in outputs(model, x)]).sum()


def gradients(model: nn.Module, x: Tensor) -> Tensors:
    """Of `loss_of`, for each parameter that asks for one."""
    model.zero_grad()
    loss_of(model, x).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def check_misfit(
    model: nn.Module, state: Tensors, change: Callable[[Tensors], Any], message: str
) -> None:
    """`load_official` refuses the state once `change` has changed it, and changes no weight."""
    changed, before = dict(state), copy.deepcopy(model.state_dict())
    change(changed)
    with pytest.raises(ValueError, match=message):
        load_official(model, changed)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def small_cat(depths: tuple[int, ...] = (2, 1, 1, 1), **options: Any) -> CAT:
    """A CAT of 8 channels and twice as many in each further stage, in heads of 4, for 56 x 56."""
    heads = tuple(2 ** (i + 1) for i in range(len(depths)))
    return CAT(8, depths, heads, **{"num_classes": 5, "img_size": 56, "drop_path": 0.0, **options})


def small_coat(depth: int = 2, **options: Any) -> CoaT:
    """A CoaT of 5 serial blocks, `depth` parallel ones, and 8 heads of 1, 2, 2 and 2 channels."""
    return CoaT((8, 16, 16, 16), (1, 1, 1, 2), (2, 2, 2, 2), depth, **{"num_classes": 5, **options})


def small_crossvit(**options: Any) -> CrossViT:
    """A CrossViT of 2 stages, with 1 and 2 blocks of 8 and 16 channels in 2 heads, for 64 x 96."""
    given = {"num_classes": 5, "stages": 2, "img_size": (64, 96), **options}
    return CrossViT(**{"dims": (8, 16), "heads": 2, "depths": (1, 2), "mlp_ratio": 2, **given})


def small_cabvit(**options: Any) -> CabViT:
    """A CabViT of 1, 1, 3 and 2 blocks for 64 x 96: grids of 4 x 6 and 2 x 3, 2 heads and 4."""
    given = {"num_classes": 5, "head_dim": 4, "img_size": (64, 96), "layer_scale": 0.5, **options}
    return CabViT(**{"dims": (8, 8, 8, 16), "depths": (1, 1, 3, 2), **given})


def small_plain_cabvit(**options: Any) -> PlainCabViT:
    """A plain CabViT of 3 blocks of 16 channels in 2 heads for 64 x 96: patches of 8, 8 x 12."""
    given = {"num_classes": 5, "patch": 8, "img_size": (64, 96), "layer_scale": 1.0, **options}
    return PlainCabViT(**{"dim": 16, "depth": 3, "heads": 2, **given})


cabvits = pytest.mark.parametrize(
    "small", [small_cabvit, small_plain_cabvit], ids=["hybrid", "plain"]
)


def scrambled(model: nn.Module) -> nn.Module:
    """All parameters and running statistics random, in eval mode: tables begin near zero."""
    for key, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in key or "bn" in key else 0.0, 0.3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()
