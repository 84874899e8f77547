"""The attention of timm's CrossViT, CoaT and Swin through our operators, in place.

    import timm
    from xattn_ops.integrations.timm import patch

    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
    print(patch(model))

A patched module keeps its parameters, buffers, keys, hooks and place in the model: it is given a
class derived from its own, in which the attention alone is another. So state dicts, optimizers,
`copy.deepcopy`, pickle and `torch.compile` go on as before; loading a pickled model needs timm and
this package. Patch before `torch.compile`. `torch.jit.script` does not take a patched model.

Where the results differ beyond rounding: timm masks a shifted window with -100, and we with
-infinity; gradients are differentiable once, unless the backend is the reference; dropout draws
another mask of the same distribution.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import nn

from .._backend import BACKENDS


class PatchReport(NamedTuple):
    """What `patch` did, by the names of the modules; printed, a line each."""

    replaced: dict[str, str]  # module -> the operator that computes it now
    refused: dict[str, str]  # module -> why timm's own code stays

    def __str__(self) -> str:
        lines = [f"{name}: {operator}" for name, operator in self.replaced.items()]
        lines += [f"{name}: not replaced, {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def patch(model: nn.Module, *, backend: str | None = None) -> PatchReport:
    """Replace the attention of timm's modules in `model`, in place.

    CrossAttention of CrossViT runs as `cls_cross_attention`, with the block's LayerNorm inside;
    FactorAttnConvRelPosEnc and ConvPosEnc of CoaT as `conv_relative_attention` and
    `conv_position_encoding`; WindowAttention of Swin as `inner_patch_attention` on the map, with
    shift, mask and padding inside. Their linear layers go through the library's `linear`.

    Args:
        model: of timm, or any module that holds such modules. Patched again, it stays as it is but
            for the backend.
        backend: "cuda", "triton", "cpu", "reference"; None: the first that can.

    Returns:
        Which modules were replaced, and which of their kind were not and why.

    Raises:
        ImportError: timm is missing or older than 1.0.
        TypeError: `model` is no module.
        ValueError: there is nothing to replace, or no such backend; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    found = _modules().find(model)
    replaced = {name: one.operator for name, one in found.items() if not one.refused}
    refused = {name: one.refused for name, one in found.items() if one.refused}
    if not replaced:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(
            f"model is a {type(model).__name__} in which nothing can be replaced; allowed are "
            f"timm's CrossVit, CoaT and SwinTransformer" + (f" ({reasons})" if refused else "")
        )
    for one in found.values():
        if not one.refused:
            one.replace(backend)
    return PatchReport(replaced, refused)


def unpatch(model: nn.Module) -> list[str]:
    """Give the modules that `patch` replaced their own classes back.

    Returns:
        Their names; empty where there are none.

    Raises:
        ImportError: timm is missing.
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _modules().restore(model)


def _modules() -> ModuleType:
    """The modules derived from timm's, which cannot be there without it."""
    try:
        from . import _timm_modules
    except ImportError as error:
        raise ImportError(
            f"xattn_ops.integrations.timm needs timm 1.0 or later and what it imports: "
            f"pip install timm ({error})"
        ) from error
    return _timm_modules
