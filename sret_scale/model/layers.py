"""The layers of SReT: sliced attention, feed-forward, learnable residual, block, projection, stem and pooling.

Shape letters: B batch, N tokens, D width, H heads, K head width, G groups, L tokens per group, C channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.config import StageConfig
from sret_scale.model.depth import BranchScale, branch_scales, resolved_skip

NORM_EPS = 1e-6


class LearnableResidual(nn.Module):
    """`alpha * x + multiplier * beta * f(x)` with learnable coefficients (the paper's LRC, section 3.3)."""

    def __init__(self, width: int, scale: BranchScale, skip: str) -> None:
        super().__init__()
        self.multiplier = scale.multiplier
        self.alpha = None if skip == "frozen" else nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.full((width if scale.per_channel else 1,), scale.init))

    def forward(self, x_BND: Tensor, branch_BND: Tensor, mask_B: Tensor | None = None) -> Tensor:
        """The stream after a branch; mask_B scales the branch of each sample (stochastic depth)."""
        gain = self.beta * self.multiplier
        if mask_B is not None:
            gain = mask_B[:, None, None] * gain
        kept_BND = x_BND if self.alpha is None else x_BND * self.alpha
        return kept_BND + branch_BND * gain


class SlicedAttention(nn.Module):
    """Multi-head self-attention inside equal, contiguous slices of the tokens (the paper's group self-attention)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, groups: int) -> Tensor:
        """Groups are folded into the batch, so any number of them is one fused attention call."""
        qkv = rearrange(
            self.qkv(x_BND), "b (g l) (three h k) -> three (b g) h l k", g=groups, three=3, h=self.num_heads
        )
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(rearrange(mixed, "(b g) h l k -> b (g l) (h k)", g=groups))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """The shared set of weights of a recursion: pre-norm attention and feed-forward, each with a learnable residual."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__()
        scale, _ = branch_scales(stage)
        skip = resolved_skip(stage)
        self.norm1 = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.attention = SlicedAttention(stage.width, stage.num_heads)
        self.residual1 = LearnableResidual(stage.width, scale, skip)
        self.norm2 = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.feed_forward = FeedForward(stage.width, stage.hidden_width)
        self.residual2 = LearnableResidual(stage.width, scale, skip)

    def forward(self, x_BND: Tensor, groups: int, masks_2B: Tensor | None = None) -> Tensor:
        attention_mask_B, feed_forward_mask_B = (None, None) if masks_2B is None else masks_2B
        x_BND = self.residual1(x_BND, self.attention(self.norm1(x_BND), groups), attention_mask_B)
        return self.residual2(x_BND, self.feed_forward(self.norm2(x_BND)), feed_forward_mask_B)


class NonLinearProjection(nn.Module):
    """The layer after each application, which keeps a recursion from collapsing (the paper's NLL, section 3.2)."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__()
        _, scale = branch_scales(stage)
        self.norm = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.feed_forward = FeedForward(stage.width, stage.projection_hidden_width)
        self.residual = LearnableResidual(stage.width, scale, resolved_skip(stage))

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.residual(x_BND, self.feed_forward(self.norm(x_BND)))


class Stem(nn.Module):
    """Images to the first stage's tokens on their grid: three 3 x 3 convolutions, each with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, width: int, strides: tuple[int, int, int]) -> None:
        super().__init__()
        widths = (in_channels, width // 2, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            for before, after, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in widths[1:])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCHW = F.relu(norm(conv(x_BCHW)))
        return x_BCHW


def pooling(width: int, next_width: int) -> nn.Conv2d:
    """Halves the grid and widens the channels between stages: a depthwise 3 x 3 convolution of stride 2."""
    return nn.Conv2d(width, next_width, kernel_size=3, stride=2, padding=1, groups=width)
