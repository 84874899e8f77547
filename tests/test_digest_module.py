"""DigestAttention: the attention of a CabViT block."""

from __future__ import annotations

import pytest
import torch

from xattn_ops import DigestAttention


def test_module_keys_are_those_of_the_checkpoints() -> None:
    module = DigestAttention(8, 2, (3, 5), 4)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "attention_biases": (2, 15),
        "s_token_bias": (1, 2, 1, 4),
        "s_scale_factors": (1, 4, 1),
        "s_norm.weight": (8,),
        "s_norm.bias": (8,),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }


def test_module_without_digests_has_no_parameters_for_them() -> None:
    keys = DigestAttention(8, 2, (3, 5)).state_dict().keys()
    assert keys == {"attention_biases", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    keys = DigestAttention(8, 2, (3, 5), 4, digest_scale=False, qkv_bias=False).state_dict().keys()
    assert "s_scale_factors" not in keys
    assert "qkv.bias" not in keys
    assert "s_norm.weight" in keys


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_module_is_the_official_block_s_attention(qkv_bias: bool) -> None:
    """Digests scaled, normalised, through the same qkv layer; one softmax over both parts."""
    module = DigestAttention(8, 2, (2, 3), 4, num_prefix_tokens=1, qkv_bias=qkv_bias).double()
    torch.nn.init.normal_(module.s_scale_factors)
    x, digests = torch.randn(2, 7, 8).double(), torch.randn(2, 4, 8).double()

    every = torch.cat([x, module.s_norm(digests * module.s_scale_factors)], 1)
    q, k, v = module.qkv(every).view(2, 11, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = q[:, :, :7] @ k.mT / 2
    for i in range(1, 7):
        for j in range(1, 7):
            (y, x0), (ky, kx) = divmod(i - 1, 3), divmod(j - 1, 3)
            logits[:, :, i, j] += module.attention_biases[:, abs(y - ky) * 3 + abs(x0 - kx)]
    logits[..., 7:] += module.s_token_bias
    want = module.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 8))
    torch.testing.assert_close(module(x, digests), want)
