"""A model whose depth is recursion, of whatever kind: what training, planning, telemetry and evaluation ask of it.

A kind of model (`vision.sret`) says what goes before its stages, between them and behind them.
"""

import abc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sret_scale.model.applications import application_slots, resolved_scheme, resolved_skip
from sret_scale.model.config import StackConfig
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import Noise
from sret_scale.model.vision.carry_weights import adapted_state

ParameterKind = Literal["tied", "projection", "conditioning", "residual", "stem", "pool", "position", "norm", "head"]

# First part of a parameter's name -> its kind; those of stages are told apart further.
_KINDS: dict[str, ParameterKind] = {
    "stem": "stem",
    "net": "stem",
    "position": "position",
    "pools": "pool",
    "norm": "norm",
    "memory_norm": "norm",
    "head": "head",
}


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


class StackModel(nn.Module, abc.ABC):
    """Samples to scores through `stages`. In training pass a `Noise`; without one a pass is deterministic."""

    config: StackConfig
    stem: nn.Module
    stages: nn.ModuleList
    head: nn.Module

    def forward(self, inputs: Tensor, noise: Noise | None = None, plans: Sequence[DepthPlan] | None = None) -> Tensor:
        """The scores of a batch.

        With `plans` a dimension of K more in front: for each plan in turn the scores at its supervised loop counts,
        then those at its full depth. The plans share one pass of the stem.
        """
        if plans is None:
            return self.forward_head(self.forward_features(inputs, noise))
        first = self.forward_stem(inputs, noise)
        outputs = (output for plan in plans for output in self.planned_outputs(first, noise, plan))
        return torch.stack([self.forward_head(output) for output in outputs])

    def outputs_on_the_way(self, inputs: Tensor, plan: DepthPlan) -> Iterator[Tensor]:
        """What the last stage gives at the plan's supervised loop counts and at its end, as it comes."""
        yield from self.planned_outputs(self.forward_stem(inputs), None, plan)

    @abc.abstractmethod
    def forward_features(self, inputs: Tensor, noise: Noise | None = None) -> Tensor:
        """What the last stage gives, and `forward_head` takes."""

    @abc.abstractmethod
    def forward_stem(self, inputs: Tensor, noise: Noise | None = None) -> Any:
        """What goes into the first stage."""

    @abc.abstractmethod
    def planned_outputs(self, first: Any, noise: Noise | None, plan: DepthPlan) -> Iterator[Tensor]:
        """What the last stage gives at the plan's supervised loop counts and at its end, from what the stem gave."""

    @abc.abstractmethod
    def forward_head(self, features: Tensor) -> Tensor:
        """Scores from what the last stage gave."""

    def adapted(self, config: Any) -> Self:
        """A new model of another config of this kind, with this one's weights where both have them."""
        parameter = next(self.parameters())
        model = config.build().to(parameter.device, parameter.dtype).train(self.training)
        model.load_state_dict(adapted_state(self.state_dict(), self.config, config, model.state_dict()))
        return model

    def with_loops(self, num_loops: int | Sequence[int]) -> Self:
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
        return self.adapted(replace(self.config, stages=changed))

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


def layer_numbers(config: StackConfig) -> dict[str, int]:
    """The layer (see ParameterTag) of every part of the model, by the beginning of its parameters' names."""
    layers, last = {"stem": 0, "net": 0, "position": 0}, 0
    for index, stage in enumerate(config.stages):
        if index:
            last += 1
            layers[f"pools.{index - 1}"] = last
        for block in range(stage.num_blocks):
            for part in ("blocks", "memory"):
                layers[f"stages.{index}.{part}.{block}"] = last + 1 + block
        for slot in application_slots(config, index):
            # One that blocks share goes with the last of them.
            if slot.projection is not None:
                name = f"stages.{index}.projections.{slot.projection}"
                layers[name] = max(layers.get(name, 0), last + 1 + slot.block)
        last += stage.num_blocks
    return {**layers, "norm": last, "memory_norm": last, "head": last + 1}
