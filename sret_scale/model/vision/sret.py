"""The Sliced Recursive Transformer (Shen et al., ECCV 2022): stem, recursive stages, head.

Each block is registered once and looped over in `forward`: an alias under a second name would lose keys in DeepSpeed's
checkpoints. Shape letters as in `layers`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.applications import application_slots, resolved_scheme, resolved_skip
from sret_scale.model.config import SReTConfig
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.fused import NORM_EPS
from sret_scale.model.layers import pooling
from sret_scale.model.noise import Dropout, Noise
from sret_scale.model.stage import Stage
from sret_scale.model.stored_sizes import stored_sizes
from sret_scale.model.vision.carry_weights import adapted_state
from sret_scale.model.vision.padding import padded_state, unpadded_config
from sret_scale.model.vision.stem import Stem

ParameterKind = Literal["tied", "projection", "conditioning", "residual", "stem", "pool", "position", "norm", "head"]

# First part of a parameter's name -> its kind; those of stages are told apart further.
_KINDS: dict[str, ParameterKind] = {
    "stem": "stem",
    "position": "position",
    "pools": "pool",
    "norm": "norm",
    "head": "head",
}


def on_grid(x_BND: Tensor) -> Tensor:
    """(B, D, H, W) tokens of a square grid."""
    return rearrange(x_BND, "b (h w) c -> b c h w", h=math.isqrt(x_BND.shape[1]))


@dataclass(frozen=True)
class ParameterTag:
    """What an optimiser has to know of a parameter: its class, whether weights decay, and a factor of the rate.

    layer, num_layers: its place for rates that fall with the distance from the head. Stem and position are layer 0;
        each block with its projections is one, however often it is applied, and each pooling; the norm before the head
        goes with the last block; the head is the last.
    """

    kind: ParameterKind
    decay: bool
    lr_scale: float = 1.0
    layer: int = 0
    num_layers: int = 1


class SReT(nn.Module):
    """Images to class scores. In training pass a `Noise`; without one a pass is deterministic (no stochastic depth)."""

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

    def forward(
        self, images_BCHW: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None
    ) -> Tensor:
        """(B, num_classes) scores of normalised images of the configured size; (B, num_classes, H, W) of a token head.

        With `plans` a dimension of K more in front: for each plan in turn the scores at its supervised loop counts,
        then those at its full depth. The plans share one pass of the stem.
        """
        if plans is None:
            return self.forward_head(self.forward_features(images_BCHW, noise))
        stem_BDHW = self.forward_stem(images_BCHW, noise)
        outputs = (output for plan in plans for output in self._planned_outputs(stem_BDHW, noise, plan))
        return torch.stack([self.forward_head(output_BDHW) for output_BDHW in outputs])

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

    def outputs_on_the_way(self, images_BCHW: Tensor, plan: DepthPlan) -> Iterator[Tensor]:
        """(B, D, H, W) tokens of the last stage at the plan's supervised loop counts and at its end, as they come."""
        yield from self._planned_outputs(self.forward_stem(images_BCHW), None, plan)

    def _planned_outputs(self, x_BDHW: Tensor, noise: Noise | None, plan: DepthPlan) -> Iterator[Tensor]:
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

    def with_loops(self, num_loops: int | Sequence[int]) -> "SReT":
        """A new model with these loops (per stage, or the same in all) and this one's weights.

        Branch scheme and skip stay what they are here; a multiplier that is a function of the loops follows them.
        """
        stages = self.config.stages
        counts = (num_loops,) * len(stages) if isinstance(num_loops, int) else tuple(num_loops)
        if len(counts) != len(stages):
            raise ValueError(f"with_loops needs one loop count for each of {len(stages)} stages, got {counts}")
        changed = tuple(
            replace(stage, num_loops=count, branch_scheme=resolved_scheme(stage), skip=resolved_skip(stage))
            for stage, count in zip(stages, counts, strict=True)
        )
        return self._adapted(replace(self.config, stages=changed))

    def with_image_size(self, image_size: int) -> "SReT":
        """A new model for images of another size, with this one's weights and its position tensor interpolated."""
        return self._adapted(replace(self.config, image_size=image_size))

    def _adapted(self, config: SReTConfig) -> "SReT":
        model = SReT(config).to(self.position.device, self.position.dtype).train(self.training)
        model.load_state_dict(adapted_state(self.state_dict(), self.config, config, model.state_dict()))
        return model

    def parameter_tags(self) -> dict[str, ParameterTag]:
        """A tag for every parameter by name. As in DeiT, vectors and what tells positions do not decay, nor
        does conditioning, which starts at zero and would be pulled back to the tied model."""
        layers = layer_numbers(self.config)
        return {name: self._tag(name, parameter, layers) for name, parameter in self.named_parameters()}

    def _tag(self, name: str, parameter: nn.Parameter, layers: dict[str, int]) -> ParameterTag:
        parts = name.split(".")
        lr_scale = 1.0
        kind = _KINDS.get(parts[0], "tied")
        if parts[0] == "stages":
            if parts[2] == "projections":
                kind = "projection"
            if "conditioning" in parts:
                kind = "conditioning"
            if parts[-1] == "offsets":
                kind = "position"
            if parts[-2].startswith("residual"):
                kind = "residual"
                stage = self.config.stages[int(parts[1])]
                if parts[-1] == "alpha" and resolved_skip(stage) == "slow":
                    lr_scale = 1.0 / stage.num_applications
        return ParameterTag(
            kind,
            decay=parameter.ndim > 1 and kind not in ("position", "conditioning"),
            lr_scale=lr_scale,
            layer=next(layers[prefix] for prefix in itertools.accumulate(parts, "{}.{}".format) if prefix in layers),
            num_layers=layers["head"] + 1,
        )


def layer_numbers(config: SReTConfig) -> dict[str, int]:
    """The layer (see ParameterTag) of every part of the model, by the beginning of its parameters' names."""
    layers, last = {"stem": 0, "position": 0}, 0
    for index, stage in enumerate(config.stages):
        if index:
            last += 1
            layers[f"pools.{index - 1}"] = last
        for block in range(stage.num_blocks):
            layers[f"stages.{index}.blocks.{block}"] = last + 1 + block
        for slot in application_slots(config, index):
            # One that blocks share goes with the last of them.
            if slot.projection is not None:
                name = f"stages.{index}.projections.{slot.projection}"
                layers[name] = max(layers.get(name, 0), last + 1 + slot.block)
        last += stage.num_blocks
    return {**layers, "norm": last, "head": last + 1}
