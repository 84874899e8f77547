"""Names alone: see `torchvision`."""
