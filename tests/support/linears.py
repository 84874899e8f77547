"""Inputs of linear layers and MLPs, the plain formulations, and the comparison with float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def linear_inputs(rows: tuple[int, ...], k: int, n: int) -> list[Tensor]:
    return [random(*rows, k), (torch.randn(n, k) / k**0.5).requires_grad_(), random(n)]


def mlp_inputs(rows: tuple[int, ...], k: int, hidden: int, n: int) -> list[Tensor]:
    x, w1, b1 = linear_inputs(rows, k, hidden)
    _, w2, b2 = linear_inputs((0,), hidden, n)
    return [x, w1, b1, w2, b2, random(*rows, n)]


def plain_linear(x: Tensor, w: Tensor, b: Tensor | None, activation: str | None = None) -> Tensor:
    y = F.linear(x, w, b)
    return F.gelu(y) if activation else y


def plain_mlp(x, w1, b1, w2, b2, residual=None) -> Tensor:
    y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    return y if residual is None else residual + y


def compare(fast, plain, inputs: list[Tensor], grad: Tensor | None = None) -> None:
    """Results and gradients: error against float64 at most that of float32 times 2 and 3."""
    y = fast(*inputs)
    grad = torch.randn_like(y) if grad is None else grad
    wide = [t.detach().double().requires_grad_() for t in inputs]

    def run(function, tensors):
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    exact, theirs = run(plain, wide), run(plain, inputs)
    ours = [y, *torch.autograd.grad(y, inputs, grad)]
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == torch.float32
        if a.numel() == 0:
            continue
        floor = 1e-6 * max(c.abs().max().item(), 1e-3)
        worst = (a - c).abs().max().item()
        assert worst <= (3 if i else 2) * (b - c).abs().max().item() + floor, i
