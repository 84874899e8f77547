"""Who looks at whom: the weights that digest attention never stores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from .interface import check
from .reference import relative_index


def digest_attention_map(
    qkv: Tensor,
    digest_kv: Tensor | None = None,
    bias_table: Tensor | None = None,
    digest_bias: Tensor | None = None,
    *,
    num_heads: int,
    grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    query: int | None = None,
) -> Tensor:
    """The attention weights of `digest_attention` (CabViT, eq. 4 and Fig. 6), in plain PyTorch.

    Args:
        qkv, digest_kv, bias_table, digest_bias, num_heads, grid, num_prefix_tokens, scale: of
            `digest_attention`.
        query: the place of one query among the tokens; None: all.

    Returns:
        [B, num_heads, N, N + M], or [B, num_heads, N + M] of one query: first the weights of the
        tokens, then those of the digests; each row sums to 1. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.
    """
    tensors = (qkv, digest_kv, bias_table, digest_bias)
    gh, gw, prefix, scale = check(*tensors, num_heads, grid, num_prefix_tokens, scale)
    N, C3 = qkv.shape[1:]
    if query is not None and _checks.integer("query", query, 0) >= N:
        raise ValueError(f"query must be less than the number of tokens, {N}, got {query}")
    D = C3 // 3 // num_heads
    queries = slice(None) if query is None else slice(query, query + 1)

    q, k, _ = qkv.unflatten(-1, (3, num_heads, D)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D]
    logits = scale * (q[:, :, queries] @ k.mT)
    if bias_table is not None:
        relative = bias_table[:, relative_index((gh, gw), qkv.device)]
        logits = logits + F.pad(relative, (prefix, 0, prefix, 0))[:, queries]
    if digest_kv is not None:
        dk = digest_kv.unflatten(-1, (2, num_heads, D))[:, :, 0].transpose(1, 2)
        far = scale * (q[:, :, queries] @ dk.mT)
        if digest_bias is not None:
            far = far + digest_bias[:, None]
        logits = torch.cat([logits, far], -1)
    weights = logits.softmax(-1)
    return weights if query is None else weights[:, :, 0]
