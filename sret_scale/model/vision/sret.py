"""The Sliced Recursive Transformer (Shen et al., ECCV 2022): stem, recursive stages, head.

Each block is registered once and looped over in `forward`: an alias under a second name would lose keys in DeepSpeed's
checkpoints. Shape letters as in `layers`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.config import SReTConfig
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.layers import pooling
from sret_scale.model.noise import Dropout, Noise
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Stage
from sret_scale.model.stored_sizes import stored_sizes
from sret_scale.model.vision.padding import padded_state, unpadded_config
from sret_scale.model.vision.stem import Stem


def on_grid(x_BND: Tensor) -> Tensor:
    """(B, D, H, W) tokens of a square grid."""
    return rearrange(x_BND, "b (h w) c -> b c h w", h=math.isqrt(x_BND.shape[1]))


def as_sret(model: StackModel, asked: str) -> "SReT":
    """The model itself; ValueError, naming what was asked of it, where it is of another kind."""
    if not isinstance(model, SReT):
        raise ValueError(f"{asked}: expected a model of kind 'vision', got one of kind {model.config.kind!r}")
    return model


class SReT(StackModel):
    """Images to class scores. In training pass a `Noise`; without one a pass is deterministic (no stochastic depth)."""

    config: SReTConfig
    stem: Stem
    head: nn.Linear

    def __init__(self, config: SReTConfig) -> None:
        # Drawn in published sizes, so that a padded model starts as the one that it stores.
        drawn = SReT(unpadded_config(config)).state_dict() if config.padded else None
        super().__init__()
        self.config = config
        widths = [stored_sizes(config, index).width for index in range(len(config.stages))]
        self.stem = Stem(config)
        self.position: Tensor
        if config.positions == "learned":
            self.position = nn.Parameter(torch.empty(1, widths[0], config.grids[0], config.grids[0]))
        else:
            self.register_buffer("position", torch.zeros(1, 1, 1, 1), persistent=False)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(widths)))
        self.pools = nn.ModuleList(pooling(*pair) for pair in itertools.pairwise(widths))
        self.norm = nn.LayerNorm(config.stages[-1].width, eps=NORM_EPS)
        self.head = nn.Linear(config.stages[-1].width, config.num_classes)
        if config.positions == "learned":
            nn.init.trunc_normal_(self.position, std=0.02)
        if drawn is not None:
            self.load_state_dict(padded_state(config, drawn, self.state_dict()))

    def forward_features(self, images_BCHW: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, D, H, W) tokens of the last stage on their grid."""
        *_, last_BDHW = self.stage_outputs(images_BCHW, noise)
        return last_BDHW

    def stage_outputs(self, images_BCHW: Tensor, noise: Noise | None = None) -> Iterator[Tensor]:
        """(B, D, H, W) tokens of each stage on their grid, as they are computed."""
        x_BDHW = self.forward_stem(images_BCHW, noise)
        for index, stage in enumerate(self.stages):
            x_BND = self.stage_input(x_BDHW, index)
            x_BDHW = on_grid(stage(x_BND, noise))
            yield x_BDHW[:, : self.config.stages[index].width]

    def planned_outputs(self, x_BDHW: Tensor, noise: Noise | None, plan: DepthPlan) -> Iterator[Tensor]:
        """(B, D, H, W) tokens of the last stage at the plan's supervised loop counts and at its end."""
        for index, stage in enumerate(self.stages):
            is_last = index == len(self.stages) - 1
            counts = plan.supervised if is_last else ()
            for x_BND in cast(Stage, stage).outputs(self.stage_input(x_BDHW, index), noise, plan, counts):
                x_BDHW = on_grid(x_BND)
                if is_last:
                    yield x_BDHW

    def stage_input(self, x_BDHW: Tensor, index: int) -> Tensor:
        """(B, N, D) tokens that a stage takes, from the grid that the stem or the stage before left."""
        if index:
            x_BDHW = self.pools[index - 1](x_BDHW)
        # The residual stream is fp32 even where a convolution under autocast gave bf16.
        return rearrange(x_BDHW, "b c h w -> b (h w) c").to(self.position.dtype).contiguous()

    def forward_stem(self, images_BCHW: Tensor, noise: Noise | None = None) -> Tensor:
        """(B, D, H, W) first tokens on their grid, position added."""
        size, channels = self.config.image_size, self.config.in_channels
        if tuple(images_BCHW.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"this model takes images of shape (batch, {channels}, {size}, {size}), got {tuple(images_BCHW.shape)}"
            )
        x_BCHW = self.stem(images_BCHW) + self.position
        if self.training and noise is not None and self.config.dropout:
            x_BCHW = x_BCHW * Dropout(self.config.dropout, (noise.sample_seed,)).masks(x_BCHW)(x_BCHW.shape)
        return x_BCHW

    def forward_head(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_classes) scores of the last stage's tokens: average, norm, linear; (B, D) if pre_logits.

        A token head has no average: (B, num_classes, H, W), and (B, D, H, W) if pre_logits.
        """
        if self.config.head == "tokens":
            x_BHWD = self.norm(x_BDHW.movedim(1, -1)[..., : self.norm.normalized_shape[0]])
            return (x_BHWD if pre_logits else self.head(x_BHWD)).movedim(-1, 1)
        x_BD = self.norm(x_BDHW.mean(dim=(2, 3))[:, : self.norm.normalized_shape[0]])
        return x_BD if pre_logits else self.head(x_BD)

    def with_image_size(self, image_size: int) -> "SReT":
        """A new model for images of another size, with this one's weights and its position tensor interpolated."""
        return self.adapted(replace(self.config, image_size=image_size))
