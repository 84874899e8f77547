"""Names alone: see `torchvision`."""


class ToTensor:
    """timm.data derives from it."""
