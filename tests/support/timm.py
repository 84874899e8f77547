"""timm for the tests: importable without torchvision, and small models of the families we patch."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STUBS = Path(__file__).parent / "stubs"


def _import_timm() -> Any:
    """timm, with stubs in place of a torchvision that is missing or of another torch's build."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.path.insert(0, str(STUBS))
    return pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm")


timm = _import_timm()

# imported late, for they need what the above puts in place
from timm.models.coat import CoaT  # noqa: E402
from timm.models.crossvit import CrossVit  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402

from xattn_ops.integrations.timm import patch  # noqa: E402


def small_crossvit(**options: Any) -> nn.Module:
    """Two stages of 16 and 32 channels, for 48 x 48: 4 x 4 and 3 x 3 patches."""
    sizes = {"img_size": 48, "embed_dim": (16, 32), "patch_size": (12, 16), "num_heads": (2, 4)}
    depths = {"depth": ((1, 2, 0), (1, 1, 0)), "mlp_ratio": (2, 2, 1), "num_classes": 5}
    return CrossVit(**{**sizes, **depths, **options})


def small_coat(parallel_depth: int = 2, **options: Any) -> nn.Module:
    """Five serial blocks and `parallel_depth` parallel ones, 8 heads of 1, 2, 2, 2 channels."""
    sizes = {"img_size": 64, "patch_size": 4, "embed_dims": (8, 16, 16, 16), "num_classes": 5}
    depths = {"serial_depths": (1, 1, 1, 2), "mlp_ratios": (2, 2, 2, 2)}
    return CoaT(**{**sizes, **depths, "parallel_depth": parallel_depth, **options})


def small_coat_lite(**options: Any) -> nn.Module:
    return small_coat(0, **options)


def small_swin(**options: Any) -> nn.Module:
    """Two stages of 16 and 32 channels, windows of 4 x 4, for 32 x 32: maps of 8 x 8 and 4 x 4."""
    sizes = {"img_size": 32, "embed_dim": 16, "num_heads": (2, 4), "window_size": 4}
    depths = {"depths": (2, 2), "mlp_ratio": 2, "num_classes": 5, "drop_path_rate": 0.0}
    return SwinTransformer(**{**sizes, **depths, **options})


SMALL: dict[str, Callable[..., nn.Module]] = {
    "crossvit": small_crossvit,
    "coat": small_coat,
    "coat_lite": small_coat_lite,
    "swin": small_swin,
}
families = pytest.mark.parametrize("family", SMALL)


def lively(model: nn.Module) -> nn.Module:
    """The model with weights that make its attention uneven: fresh ones hardly matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            if name.endswith("relative_position_bias_table"):
                p.copy_(values)
            elif name.endswith("weight") and p.dim() > 1:
                p.copy_(2 * values / p[0].numel() ** 0.5)
            else:
                p.add_(0.1 * values)
    return model


def small(family: str, **options: Any) -> nn.Module:
    return lively(SMALL[family](**options))


def image_for(model: nn.Module, batch: int = 2) -> Tensor:
    """As large as the model was built for."""
    size = getattr(model, "img_size", None)
    if size is None:
        embed = getattr(model, "patch_embed", None) or model.patch_embed1
        size = embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_near(got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal up to this share of the largest entry; None: what many layers may round off."""
    if tolerance is None:
        tolerance = 1e-11 if expected.dtype == torch.float64 else 1e-5
    largest = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * largest)


def assert_same_logits(model: nn.Module, x: Tensor, backend: str | None = None) -> None:
    """With and without gradients, for a copy that is patched."""
    patched = copy.deepcopy(model)
    patch(patched, backend=backend)
    expected = model(x)
    assert_near(patched(x), expected)
    with torch.no_grad():
        assert_near(patched(x), expected)


def contents(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Every module's class and attributes."""
    return {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
