"""How deep a step of training is: loop counts, detached branches and further losses, as pure functions of (seed, step).

Counts are those of the stage with the most loops; the other stages run the same share of theirs, rounded, at least one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipelines.field_checks import check_fields, require
from sret_scale.model import StackConfig
from sret_scale.model.applications import post_norm
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.noise import seed_sequence

Draw = Literal["all", "fixed", "uniform", "poisson", "lognormal_poisson", "log_uniform", "growing"]


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """What a step runs of the model's loops. The default runs them all, with one loss at the end.

    min_loops: the fewest that a draw gives.
    mean_loops: the mean of the Poisson draws.
    """

    loops: Draw = "all"
    """How the count of a step is drawn. `fixed`: max_loops; `uniform`: min_loops to max_loops; `poisson`: 1 + Poisson
    of mean_loops - 1; `lognormal_poisson`: the same with a rate that is log-normal around it (Geiping et al., arXiv
    2502.05171); `log_uniform`: min_loops and, log-uniformly, none to all of the rest of max_loops; `growing`: min_loops
    to max_loops, evenly over growth_images. Draws are cut to min_loops and max_loops."""
    min_loops: int = 1
    max_loops: int | None = None
    """None: all that the model has."""
    mean_loops: float | None = None
    log_sigma: float = 0.5
    """Standard deviation of the logarithm of the log-normal rate (0.5 in the paper)."""
    growth_images: int = 0
    """Images until `growing` has reached max_loops; 0 takes the whole run."""
    left_out: Literal["last", "any"] = "last"
    """Which loops a count leaves out: the last ones, or a choice drawn per stage."""
    late_loops: Literal["refuse", "allow"] = "refuse"
    """What to do where late loops that own parameters would be trained in few steps only: with counts uniform
    in 8 to 24 the last loop in one step of 17."""
    backprop_loops: int | None = None
    """Only the branches of the last so many loops get a gradient; None: all."""
    supervised_loops: tuple[int, ...] = ()
    """Loop counts of the last stage at which the shared head's scores enter the loss too, where a step reaches them."""
    supervise_every: int | None = None
    """In place of counts: after every so many of the last stage's loops with gradient, with weight 1."""
    supervision_weights: tuple[float, ...] = ()
    """One a count; the scores at full depth have weight 1, and the loss is the weighted mean."""
    mixed_loops: tuple[int, ...] = ()
    """Counts of further branches that every step runs with the same weights (mixed-depth training)."""
    mixed_weights: tuple[float, ...] = ()
    """One a branch."""

    def __post_init__(self) -> None:
        for name in ("supervised_loops", "supervision_weights", "mixed_loops", "mixed_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bounds = {
            "at least 1": "min_loops max_loops backprop_loops supervise_every mean_loops",
            "0 or more": "growth_images log_sigma",
        }
        check_fields(self, "depth", bounds)
        _require(not (self.supervise_every and self.supervised_loops), "supervise_every", "no supervised_loops", "both")
        if self.loops == "all":
            for name, unused in (("min_loops", 1), ("max_loops", None), ("left_out", "last")):
                _require(getattr(self, name) == unused, name, "a depth.loops that draws counts", getattr(self, name))
        is_growing = self.loops == "growing"
        _require(is_growing or not self.growth_images, "growth_images", "depth.loops=growing", self.growth_images)
        has_mean = self.loops in ("poisson", "lognormal_poisson")
        _require(
            (self.mean_loops is not None) == has_mean, "mean_loops", "with the poisson draws only", self.mean_loops
        )
        is_range = self.max_loops is None or self.min_loops <= self.max_loops
        _require(is_range, "min_loops", "at most max_loops", self.min_loops)
        _require(self.loops != "fixed" or self.max_loops is not None, "max_loops", "a count for fixed", None)
        for counts, weights in (("supervised_loops", "supervision_weights"), ("mixed_loops", "mixed_weights")):
            values, own = getattr(self, counts), getattr(self, weights)
            _require(len(values) == len(own), weights, f"one for each of {counts}", own)
            _require(all(count >= 1 for count in values), counts, "counts of at least 1", values)
            _require(list(values) == sorted(set(values)), counts, "ascending counts", values)
            _require(all(weight > 0 for weight in own), weights, "above 0", own)

    @property
    def has_many_losses(self) -> bool:
        """Whether the loss is a mean over scores of several depths."""
        return bool(self.supervised_loops or self.supervise_every or self.mixed_loops)


def _require(is_valid: bool, name: str, expected: str, got: object) -> None:
    require(is_valid, f"depth.{name}", expected, got)


def drawn_loops(config: DepthConfig, most: int, *, seed: int, step: int, progress: float) -> int:
    """The loop count of a step for a stage of `most` loops; progress: the share of the growth that lies behind."""
    high = config.max_loops or most
    low = config.min_loops
    if config.loops in ("all", "fixed"):
        return most if config.loops == "all" else high
    if config.loops == "growing":
        return low + min(high - low, int((high - low + 1) * progress))
    random = _generator("loops", seed, step)
    if config.loops == "uniform":
        return int(random.integers(low, high, endpoint=True))
    if config.loops == "log_uniform":
        return low - 1 + int(math.exp(random.uniform(0, math.log(high - low + 1))))
    assert config.mean_loops is not None
    rate = config.mean_loops - 1
    if config.loops == "lognormal_poisson" and rate > 0:
        # The mean of the log-normal is `rate` itself.
        rate = math.exp(random.normal(math.log(rate) - config.log_sigma**2 / 2, config.log_sigma))
    return min(high, max(low, 1 + int(random.poisson(rate))))


def depth_plans(
    config: DepthConfig, model: StackConfig, *, seed: int, step: int, progress: float
) -> tuple[DepthPlan, ...] | None:
    """The passes of a step: the drawn depth, then the mixed ones. None for one pass of all loops with one loss."""
    most = max(stage.num_loops for stage in model.stages)
    drawn = drawn_loops(config, most, seed=seed, step=step, progress=progress)
    if drawn == most and config.backprop_loops is None and not config.has_many_losses:
        return None
    plans = tuple(
        _plan(config, model, most, count, seed=seed, step=step, branch=branch)
        for branch, count in enumerate((drawn, *config.mixed_loops))
    )
    stage = plans[0].stages[-1]
    last = len(stage.loops)
    supervised = tuple(count for count in config.supervised_loops if count < last)
    if config.supervise_every:
        supervised = tuple(range(stage.num_detached + config.supervise_every, last, config.supervise_every))
    return (DepthPlan(plans[0].stages, supervised), *plans[1:])


def deepest_plan(config: DepthConfig, model: StackConfig) -> DepthPlan | None:
    """The pass of a step that takes the most memory; None for all loops, and where steps make several passes."""
    if config.mixed_loops:
        return None
    if config.loops != "all":
        most = max(stage.num_loops for stage in model.stages)
        config = replace(config, loops="fixed", max_loops=config.max_loops or most, mean_loops=None, growth_images=0)
    plans = depth_plans(config, model, seed=0, step=0, progress=1.0)
    return None if plans is None else plans[0]


def weighted_loss(config: DepthConfig, plans: Sequence[DepthPlan], losses: Sequence[Tensor]) -> Tensor:
    """The mean of the losses of all scores of `plans`, in their order, full depth with weight 1."""
    weight_of = dict(zip(config.supervised_loops, config.supervision_weights, strict=True))
    weights = [*(weight_of.get(count, 1.0) for count in plans[0].supervised), 1.0, *config.mixed_weights]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def _plan(
    config: DepthConfig, model: StackConfig, most: int, count: int, *, seed: int, step: int, branch: int
) -> DepthPlan:
    stages = []
    for index, stage in enumerate(model.stages):
        number = share_of(count, stage.num_loops, most)
        loops = tuple(range(number))
        if config.left_out == "any" and number < stage.num_loops:
            random = _generator("which loops", seed, step, index, branch)
            loops = tuple(sorted(random.choice(stage.num_loops, number, replace=False).tolist()))
        kept = number if config.backprop_loops is None else share_of(config.backprop_loops, stage.num_loops, most)
        stages.append(StageDepth(loops, num_detached=max(0, number - kept)))
    return DepthPlan(tuple(stages))


def proportional_loops(model: StackConfig, count: int) -> tuple[int, ...]:
    """The loops of every stage where the stage with the most has `count`, more than now or fewer."""
    most = max(stage.num_loops for stage in model.stages)
    return tuple(max(1, round(count * stage.num_loops / most)) for stage in model.stages)


def share_of(count: int, num_loops: int, most: int) -> int:
    """The loops of a stage of `num_loops`, where the one with the most runs `count` of `most`."""
    return min(num_loops, max(1, round(count * num_loops / most)))


def _generator(purpose: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng(seed_sequence(purpose, *numbers))


def check_depth(config: DepthConfig, model: StackConfig, *, schedule: str, zero_stage: int, has_features: bool) -> None:
    """ValueError where the model or the run cannot do what `config` asks for."""
    if config == DepthConfig():
        return
    most = max(stage.num_loops for stage in model.stages)
    for name in ("min_loops", "max_loops", "backprop_loops", "supervise_every"):
        value = getattr(config, name)
        _require(value is None or value <= most, name, f"at most {most}, the loops of the model", value)
    _require(all(count < most for count in config.mixed_loops), "mixed_loops", f"less than {most}", config.mixed_loops)
    last = model.stages[-1].num_loops
    _require(
        all(count < last for count in config.supervised_loops),
        "supervised_loops",
        f"less than {last}, the loops of the last stage",
        config.supervised_loops,
    )
    if zero_stage == 3:
        raise ValueError(
            "depth: ZeRO 3 gathers the parameters of whole stages, also of loops that do not run; "
            "use engine.ds_config=zero1, or leave depth at its defaults"
        )
    cuts_move = bool(config.supervised_loops and config.backprop_loops and config.loops not in ("all", "fixed"))
    if schedule == "planned" and (config.mixed_loops or cuts_move):
        raise ValueError(
            "memory.schedule=planned plans the chains of one pass; depth.mixed_loops make several, and "
            "supervised_loops with drawn loops and backprop_loops others in every step: use depth.supervise_every, or "
            "memory.schedule=binomial"
        )
    if has_features and config.has_many_losses:
        raise ValueError(
            "distill.feature_weight compares one set of features with the teacher's; depth.supervised_loops and "
            "mixed_loops make several: set distill.feature_weight=0"
        )
    _check_stages(config, model)


def _check_stages(config: DepthConfig, model: StackConfig) -> None:
    varies = config.loops not in ("all", "fixed")
    for index, stage in enumerate(model.stages):
        if config.backprop_loops is not None and post_norm(stage):
            raise ValueError(
                f"depth.backprop_loops: stage {index} has norm_placement {stage.norm_placement!r}, which norms the "
                "stream itself: no skip carries the gradient past a detached branch; use 'pre' or 'subln'"
            )
        owned = own_parameters(model, index)
        if varies and owned and config.left_out == "last" and config.late_loops == "refuse" and stage.num_loops > 1:
            raise ValueError(
                f"depth.loops={config.loops}: every loop of stage {index} has its own {' and '.join(owned)}, and the "
                "last loops would run in few steps, so theirs would hardly be trained: share them "
                "(projections=per_block with conditioning=norm_by_depth), or set depth.left_out=any, or "
                "depth.late_loops=allow"
            )


def own_parameters(model: StackConfig, index: int) -> list[str]:
    """What the loops of a stage do not share."""
    stage = model.stages[index]
    owned = ["projections"] if stage.projections in ("per_application", "per_loop") else []
    return owned + (["conditioning"] if stage.conditioning not in ("none", "norm_by_depth", "input_tied") else [])
