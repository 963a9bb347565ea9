"""Tells a block which of its loops it is in: small parameters that change its weights or its input, zero at first.

Plain tying costs accuracy because every use of a block is the same function; each of these makes the uses differ.
Letters: D width, F hidden channels, R rank, P features of the depth coordinate.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sret_scale.model.applications import LoopPosition
from sret_scale.model.config import StageConfig
from sret_scale.model.stored_sizes import Sizes
from sret_scale.model.upload import uploaded

NUM_DEPTH_FEATURES = 16


@dataclass(frozen=True)
class LoopDeltas:
    """What one loop adds to a block's weights: (2, 2, D) to scale and bias of both norms, and to two linear layers."""

    norms: Tensor | None = None
    qkv: Tensor | None = None
    fc1: Tensor | None = None


class NormPerLoop(nn.Module):
    """Scale and bias of both LayerNorms differ per loop."""

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(stage.num_loops, 2, 2, stage.width))

    def deltas(self, loop: int, place: LoopPosition | None = None) -> LoopDeltas:
        """Of one loop: `norms` (2 norms, scale and bias, D), added to the block's own."""
        return LoopDeltas(norms=self.delta[loop])


class NormByDepth(nn.Module):
    """Scale and bias of both LayerNorms are a smooth function of a depth coordinate in [0, 1] (0 the first loop).

    Its size does not depend on the number of loops, so it suits models whose depth is sampled or changed later.
    """

    features: Tensor

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(NUM_DEPTH_FEATURES, 4 * stage.width))
        self.register_buffer("features", depth_features(stage.num_loops), persistent=False)

    def deltas(self, loop: int, place: LoopPosition | None = None) -> LoopDeltas:
        """`norms` (2 norms, scale and bias, D) at the loop's depth, or at `place` among another number of loops."""
        if place is None or place.num_loops == len(self.features):
            features = self.features[loop if place is None else place.position]
        else:
            row = depth_features(place.num_loops)[place.position]
            features = uploaded(row, self.features.device).to(self.features.dtype)
        return LoopDeltas(norms=(features @ self.delta).view(2, 2, -1))


def depth_features(num_loops: int) -> Tensor:
    """(num_loops, P) cosines of the depth coordinate of every loop."""
    coordinate = torch.arange(num_loops) / max(num_loops - 1, 1)
    return (math.pi * coordinate[:, None] * torch.arange(NUM_DEPTH_FEATURES)).cos()


class LowRankPerLoop(nn.Module):
    """A matrix of rank R per loop is added to the qkv and the first feed-forward weights (as in LoRA, per loop)."""

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        loops, rank = stage.num_loops, stage.conditioning_rank
        self.down = nn.Parameter(torch.randn(loops, 2, rank, sizes.width) * stage.width**-0.5)
        self.up_qkv = nn.Parameter(torch.zeros(loops, 3 * stage.num_heads * sizes.stored_head_width, rank))
        self.up_fc1 = nn.Parameter(torch.zeros(loops, sizes.hidden_width, rank))

    def deltas(self, loop: int, place: LoopPosition | None = None) -> LoopDeltas:
        """Of one loop: `qkv` (3D, D) and `fc1` (F, D), added to the weights of the block's two products."""
        return LoopDeltas(qkv=self.up_qkv[loop] @ self.down[loop, 0], fc1=self.up_fc1[loop] @ self.down[loop, 1])


class InputInjection(nn.Module):
    """The stage's input is added to the stream before every use of the block, times a gain per loop and channel.

    Gated: the gain is further multiplied by a sigmoid of the stream. Tied: one gain for all loops, 1 at first, so that
    every loop is the same step, also those beyond the ones that were trained. The stream carries the input along: a
    chain's state is (B, 2N, D), the stream before the input.
    """

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        self.is_tied = stage.conditioning == "input_tied"
        gain = torch.ones(1, sizes.width) if self.is_tied else torch.zeros(stage.num_loops, sizes.width)
        self.gain = nn.Parameter(gain)
        self.gate = nn.Linear(sizes.width, sizes.width) if stage.conditioning == "input_gated" else None

    def deltas(self, loop: int, place: LoopPosition | None = None) -> LoopDeltas:
        """None: the input is added to the stream, not to weights."""
        return LoopDeltas()

    def forward(self, x_BND: Tensor, input_BND: Tensor, loop: int) -> Tensor:
        """The stream with this loop's share of the input."""
        added_BND = input_BND * self.gain[0 if self.is_tied else loop]
        if self.gate is not None:
            added_BND = added_BND * torch.sigmoid(self.gate(x_BND))
        return x_BND + added_BND


Conditioning = NormPerLoop | NormByDepth | LowRankPerLoop | InputInjection


def conditioning(stage: StageConfig, sizes: Sizes) -> Conditioning | None:
    """The module that a stage's config asks for, one per block."""
    if stage.conditioning == "none":
        return None
    kinds: dict[str, type[Conditioning]] = {
        "norm_per_loop": NormPerLoop,
        "norm_by_depth": NormByDepth,
        "low_rank": LowRankPerLoop,
        "input_add": InputInjection,
        "input_gated": InputInjection,
        "input_tied": InputInjection,
    }
    return kinds[stage.conditioning](stage, sizes)
