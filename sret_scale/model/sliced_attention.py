"""Attention inside slices of the tokens, and on a CPU a backward pass that writes each gradient once.

Shape letters: B batch, N tokens, D width, H heads, K head width, G groups, L tokens per group, C three times D.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def sliced_attention(qkv_BNC: Tensor, groups: int, num_heads: int, scale: float) -> Tensor:
    """(B, N, D): softmax attention inside equal, contiguous slices; groups fold into the batch of one fused call.

    qkv_BNC: queries, keys and values one after the other, heads inside each.
    """
    if qkv_BNC.device.type == "cpu" and not torch.compiler.is_compiling():
        return _SlicedAttention.apply(qkv_BNC, groups, num_heads, scale)  # type: ignore[no-untyped-call]
    qkv = rearrange(qkv_BNC, "b (g l) (three h k) -> three (b g) h l k", g=groups, three=3, h=num_heads)
    # unbind, since the gradients of three indexings would be three full-size tensors of mostly zeros.
    query, key, value = qkv.unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return rearrange(mixed, "(b g) h l k -> b (g l) (h k)", g=groups)


class _SlicedAttention(torch.autograd.Function):
    """The kernel that `scaled_dot_product_attention` takes on a CPU, with its bits.

    Autograd stacks the gradients of queries, keys and values and then copies the stack into the order of `qkv_BNC`.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BNC: Tensor, groups: int, num_heads: int, scale: float) -> Tensor:
        mixed, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_split(qkv_BNC, 3, groups, num_heads), scale=scale
        )
        mixed_BND = mixed.transpose(1, 2).reshape(*qkv_BNC.shape[:2], -1)
        ctx.save_for_backward(qkv_BNC, mixed_BND, logsumexp)
        ctx.constants = groups, num_heads, scale
        return mixed_BND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_BNC, mixed_BND, logsumexp = ctx.saved_tensors
        # From here on only names hold what was saved: it is free before the gradients get their order.
        ctx.maybe_clear_saved_tensors()
        groups, num_heads, scale = ctx.constants
        shape, dtype = qkv_BNC.shape, qkv_BNC.dtype
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _split(grad_BND, 1, groups, num_heads)[0],
            *_split(qkv_BNC, 3, groups, num_heads),
            _split(mixed_BND, 1, groups, num_heads)[0],
            logsumexp,
            0.0,
            False,
            scale=scale,
        )
        del qkv_BNC, mixed_BND, logsumexp
        grad_BNC = torch.empty(shape, dtype=dtype)
        for part, value in zip(_split(grad_BNC, 3, groups, num_heads), found, strict=True):
            part.copy_(value)
        return grad_BNC, None, None, None


def _split(x: Tensor, count: int, groups: int, num_heads: int) -> tuple[Tensor, ...]:
    """`count` views (B G, H, L, K) of (B, N, count D)."""
    batch, num_tokens, width = x.shape
    parts = x.reshape(batch * groups, num_tokens // groups, count, num_heads, width // (count * num_heads))
    return parts.permute(2, 0, 3, 1, 4).unbind(0)
