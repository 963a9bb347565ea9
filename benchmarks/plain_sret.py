"""The plain twin of the model: the published way of computing, one step after another, on a model's own weights.

Explicit softmax attention in a loop-free batch of groups, tokens permuted and put back by advanced indexing in every
permuted application, recursion unrolled, and a multiply for every residual coefficient.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_windows import attend_in_windows
from sret_scale.model import Noise, SReT
from sret_scale.model.applications import application_slots, post_norm
from sret_scale.model.conditioning import InputInjection, LowRankPerLoop, NormByDepth, NormPerLoop
from sret_scale.model.layers import Attention, Block, FeedForward, LearnableResidual, NonLinearProjection
from sret_scale.model.operations import Affine
from sret_scale.model.stage import Stage


class PlainSReT(nn.Module):
    """Computes what the wrapped model computes, on the same parameters. No stochastic depth."""

    def __init__(self, model: SReT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, noise: Noise | None = None) -> Tensor:
        model = self.model
        x_BCHW = images_BCHW
        if model.config.stem == "pixels":
            x_BCHW = model.stem.convs[0](x_BCHW)
        else:
            for conv, norm in zip(model.stem.convs, model.stem.norms, strict=True):
                x_BCHW = F.relu(norm(conv(x_BCHW)))
        x_BCHW = x_BCHW + model.position
        for index in range(len(model.stages)):
            if index:
                x_BCHW = model.pools[index - 1](x_BCHW)
            batch, width, height, side = x_BCHW.shape
            x_BND = x_BCHW.flatten(2).transpose(1, 2)
            x_BND = self.run_stage(index, x_BND, noise)
            x_BCHW = x_BND.transpose(1, 2).reshape(batch, width, height, side)
        if model.config.head == "tokens":
            return model.head(model.norm(x_BCHW.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x_BD = F.adaptive_avg_pool2d(x_BCHW, 1).flatten(1)
        return model.head(model.norm(x_BD))

    def run_stage(self, index: int, x_BND: Tensor, noise: Noise | None) -> Tensor:
        stage = cast(Stage, self.model.stages[index])
        slots = application_slots(self.model.config, index)
        permutations = stage._draw_permutations(slots, x_BND, noise)
        num_permuted, input_BND = 0, x_BND
        for number, slot in enumerate(slots):
            block = cast(Block, stage.blocks[slot.block])
            permutation = None
            if slot.permuted and stage.windows is None:
                assert permutations is not None
                permutation, num_permuted = permutations[num_permuted], num_permuted + 1
            x_BND = self.inject(block, x_BND, input_BND, slot.loop)
            x_BND = self.apply_block(index, block, x_BND, slot.loop, slot.groups, permutation, number)
            if slot.projection is not None:
                projection = cast(NonLinearProjection, stage.projections[slot.projection])
                feed_forward = projection.feed_forward
                norm = (projection.norm.weight, projection.norm.bias)

                def branch(y_BND: Tensor, feed_forward: FeedForward = feed_forward) -> Tensor:
                    return self.feed(feed_forward, feed_forward.fc1.weight, y_BND)

                x_BND = self.residual(index, projection.residual, norm, x_BND, branch)
            if block.outer_norm is not None:
                x_BND = block.outer_norm(x_BND)
        return x_BND

    def inject(self, block: Block, x_BND: Tensor, input_BND: Tensor, loop: int) -> Tensor:
        conditioning = block.conditioning
        if not isinstance(conditioning, InputInjection):
            return x_BND
        gate = 1.0 if conditioning.gate is None else torch.sigmoid(conditioning.gate(x_BND))
        return x_BND + conditioning.gain[loop if len(conditioning.gain) > 1 else 0] * input_BND * gate

    def apply_block(
        self,
        index: int,
        block: Block,
        x_BND: Tensor,
        loop: int,
        groups: int,
        permutation: Tensor | None,
        number: int,
    ) -> Tensor:
        norm1: Affine = (block.norm1.weight, block.norm1.bias)
        norm2: Affine = (block.norm2.weight, block.norm2.bias)
        qkv_weight, fc1_weight = block.attention.qkv.weight, block.feed_forward.fc1.weight
        conditioning = block.conditioning
        if isinstance(conditioning, NormPerLoop | NormByDepth):
            delta = conditioning.deltas(loop).norms
            assert delta is not None
            norm1 = (norm1[0] + delta[0, 0], norm1[1] + delta[0, 1])
            norm2 = (norm2[0] + delta[1, 0], norm2[1] + delta[1, 1])
        if isinstance(conditioning, LowRankPerLoop):
            qkv_weight = qkv_weight + conditioning.up_qkv[loop] @ conditioning.down[loop, 0]
            fc1_weight = fc1_weight + conditioning.up_fc1[loop] @ conditioning.down[loop, 1]

        config = self.model.config.stages[index]

        def attend(y_BND: Tensor) -> Tensor:
            if config.slices == "windows":
                qkv_BNC = F.linear(y_BND, qkv_weight, block.attention.qkv.bias)
                mixed_BND = attend_in_windows(block.attention, qkv_BNC, config.window, number)
                inner = block.attention.inner_norm
                return block.attention.out(mixed_BND if inner is None else inner(mixed_BND))
            return self.attend(block.attention, qkv_weight, y_BND, groups, permutation)

        def feed(y_BND: Tensor) -> Tensor:
            return self.feed(block.feed_forward, fc1_weight, y_BND)

        x_BND = self.residual(index, block.residual1, norm1, x_BND, attend)
        return self.residual(index, block.residual2, norm2, x_BND, feed)

    def residual(
        self,
        index: int,
        coefficients: LearnableResidual,
        norm: Affine,
        x_BND: Tensor,
        branch: Callable[[Tensor], Tensor],
    ) -> Tensor:
        assert coefficients.beta is not None, "the twin computes unfolded models only"
        after = post_norm(self.model.config.stages[index])
        shape = x_BND.shape[-1:]
        y_BND = x_BND if after else F.layer_norm(x_BND, shape, *norm, 1e-6)
        kept_BND = x_BND if coefficients.alpha is None else coefficients.alpha * x_BND
        if after:
            kept_BND = after[0] * kept_BND
        x_BND = kept_BND + coefficients.multiplier * (coefficients.beta * branch(y_BND))
        return F.layer_norm(x_BND, shape, *norm, 1e-6) if after else x_BND

    def attend(
        self, attention: Attention, qkv_weight: Tensor, x_BND: Tensor, groups: int, permutation: Tensor | None
    ) -> Tensor:
        if permutation is not None:
            x_BND = x_BND[:, permutation, :]
        batch, num_tokens, width = x_BND.shape
        heads = attention.num_heads
        qkv = F.linear(x_BND, qkv_weight, attention.qkv.bias)
        qkv = qkv.reshape(batch, groups, num_tokens // groups, 3, heads, width // heads).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv[0], qkv[1], qkv[2]
        scores = (query @ key.transpose(-2, -1)) * (width // heads) ** -0.5
        x_BND = (scores.softmax(dim=-1) @ value).transpose(2, 3).reshape(batch, num_tokens, width)
        if permutation is not None:
            x_BND = x_BND[:, torch.argsort(permutation), :]
        if attention.inner_norm is not None:
            x_BND = attention.inner_norm(x_BND)
        return attention.out(x_BND)

    def feed(self, feed_forward: FeedForward, fc1_weight: Tensor, x_BND: Tensor) -> Tensor:
        a_BNF = F.gelu(F.linear(x_BND, fc1_weight, feed_forward.fc1.bias))
        if feed_forward.inner_norm is not None:
            a_BNF = feed_forward.inner_norm(a_BNF)
        return feed_forward.fc2(a_BNF)
