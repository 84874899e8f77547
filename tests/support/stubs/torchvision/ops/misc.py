"""Names alone: see `torchvision`."""

from torch import nn


class FrozenBatchNorm2d(nn.Module):
    """timm asks whether a layer is one."""
