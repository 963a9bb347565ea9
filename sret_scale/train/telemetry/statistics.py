"""What is read off a stream of tokens and an attention: pure functions, all without gradient.

Shapes: B batch, N tokens, D width, G groups, L tokens a group, H heads, K head width, Q queries.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from sret_scale.model.windows import HIDDEN

# Entropies are means over queries, which so many of a group estimate well; all of them would cost as much as attention.
MAX_QUERIES = 16


def rms(x: Tensor) -> Tensor:
    """Root mean square of all elements, as a scalar."""
    return x.float().square().mean().sqrt()


def token_cosine(x_BND: Tensor) -> Tensor:
    """Mean cosine between two different tokens of an image; NaN for a single token."""
    num_tokens = x_BND.shape[1]
    unit_BND = torch.nn.functional.normalize(x_BND.float(), dim=-1)
    # The sum over all pairs is the squared norm of the sum; each token's cosine with itself is 1.
    together_B = unit_BND.sum(dim=1).square().sum(dim=-1)
    return ((together_B - num_tokens) / (num_tokens * (num_tokens - 1) or math.nan)).mean()


def rank_ratio(x_BND: Tensor) -> Tensor:
    """Effective rank of an image's tokens over their width D, mean over images: (tr G)^2 / (D tr G^2) of G = x^T x.

    The participation ratio of the spectrum of G: 1 where it is flat, 1 / D where all tokens lie on one line.
    """
    x_BND = x_BND.float()
    gram_BDD = x_BND.transpose(1, 2) @ x_BND
    trace_B = gram_BDD.diagonal(dim1=1, dim2=2).sum(dim=-1)
    return (trace_B.square() / (x_BND.shape[-1] * gram_BDD.square().sum(dim=(1, 2)))).mean()


def attention_entropy(qkv_BNC: Tensor, groups: int, num_heads: int, bias_GHLL: Tensor | None = None) -> Tensor:
    """Mean entropy of attention weights over log L, from (B, N, 3D) queries, keys and values; NaN where L is 1.

    bias_GHLL: of windows (`layers.Attention.bias`), whose queries that are padding do not count, or what hides later
        tokens (L, L).
    """
    query, key, _ = rearrange(qkv_BNC.float(), "b (g l) (three h k) -> three b g h l k", g=groups, three=3, h=num_heads)
    length, width = key.shape[-2:]
    every = max(1, length // MAX_QUERIES)
    chosen = slice(0, every * MAX_QUERIES, every)
    scores = query[..., chosen, :] @ key.transpose(-1, -2) / math.sqrt(width)
    if bias_GHLL is not None:
        scores = scores + bias_GHLL[..., chosen, :]
    log_weights = scores.log_softmax(dim=-1)
    entropy = -(log_weights.exp() * log_weights).sum(dim=-1)
    if bias_GHLL is not None:
        is_real = bias_GHLL.diagonal(dim1=-2, dim2=-1)[..., chosen] > HIDDEN / 2
        entropy = entropy[is_real.expand_as(entropy)]
    return entropy.mean() / (math.log(length) or math.nan)
