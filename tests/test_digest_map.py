"""digest_attention_map: the weights that digest_attention never stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Case
from support.digest import SMALL, digest
from support.wrong import companion, heads_of, of_type, of_value, refuses, scale

from xattn_ops.digest import digest_attention_map


def maps_of(case: Case, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tensors = case.tensors(torch.float64, requires_grad=False)
    return digest_attention_map(**tensors, **case.options, **options), tensors


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SMALL, id="all"),
        pytest.param(digest(2, (3, 5), 2, 4), id="no-digests"),
        pytest.param(digest(2, (3, 5), 2, 4, M=0), id="none-of-them"),
        pytest.param(digest(1, (4, 3), 3, 5, M=7, table=False, digest_bias=False), id="no-biases"),
        pytest.param(digest(1, (4, 3), 3, 5, M=2, prefix=2, scale=0.0), id="scale-zero"),
        pytest.param(digest(1, (4, 3), 3, 5, M=2, table=False, scale=-0.7), id="scale"),
    ],
)
def test_map_times_values_is_the_output(case: Case) -> None:
    weights, tensors = maps_of(case)
    heads = case.options["num_heads"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    B, N, C = case.outs["out"]
    v = tensors["qkv"][..., 2 * C :]
    if "digest_kv" in tensors:
        v = torch.cat([v, tensors["digest_kv"][..., C:]], 1)
    assert weights.shape == (B, heads, N, v.shape[1])
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v.unflatten(-1, (heads, -1))).flatten(2)
    torch.testing.assert_close(out, case.reference(**tensors, **case.options))


@pytest.mark.parametrize("query", [0, 1, 15])
def test_one_query_is_a_row_of_the_map(query: int) -> None:
    weights, _ = maps_of(SMALL)
    torch.testing.assert_close(maps_of(SMALL, query=query)[0], weights[:, :, query])


def test_map_is_differentiable() -> None:
    tensors = SMALL.tensors(torch.float64)
    names = list(tensors)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return digest_attention_map(**dict(zip(names, values, strict=True)), **SMALL.options)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


def test_map_of_an_empty_batch() -> None:
    assert maps_of(digest(0, (4, 5), 2, 8, M=4))[0].shape == (0, 2, 20, 24)


test_bad_input = refuses(
    digest_attention_map,
    SMALL.tensors(torch.float32, requires_grad=False) | SMALL.options,
    of_type("query must be an int, got float", query=0.0),
    of_value("query must be at least 0, got -1", query=-1),
    of_value("query must be less than the number of tokens, 16, got 16", query=16),
    *heads_of("qkv", 24),
    *companion("digest_bias", "[num_heads, M]", 2, 3, of="qkv"),
    *scale(),
)
