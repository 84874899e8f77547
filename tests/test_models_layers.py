"""The layers that the families share."""

from __future__ import annotations

import pytest
import torch

from xattn_ops.models.layers import DropPath, Mlp, interleave, pad_to_multiple


def test_interleave_order():
    x = torch.arange(4.0).view(1, 2, 2, 1)  # pixel values 0 1 / 2 3
    assert interleave(x).flatten().tolist() == [0, 2, 1, 3]
    assert pad_to_multiple(torch.ones(1, 3, 5, 2), 4).shape == (1, 4, 8, 2)


def test_drop_path_drops_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    branch, shortcut = torch.ones(4000, 2, 3), torch.full((4000, 2, 3), 5.0)
    out = layer(branch, shortcut)
    samples = (out - shortcut).flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1))
    values = samples[:, 0].unique()
    torch.testing.assert_close(values, torch.tensor([0, 4 / 3]))
    assert samples.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(branch, shortcut), shortcut + branch)


def test_dropout_of_the_mlp():
    mlp, x, residual = Mlp(4, 8, 0.5), torch.randn(2000, 4), torch.randn(2000, 4)
    dropped = mlp(x, residual=residual) == residual
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(mlp.eval()(x, residual=residual), residual + mlp(x))
