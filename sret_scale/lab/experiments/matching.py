"""What is held equal between the runs of an experiment, so that depths are compared fairly.

    equal_images       all see the images of the base
    equal_flops        all spend the training FLOPs of the base: deeper runs see fewer images
    equal_parameters   all have the base's number of parameters: deeper runs are narrower
    equal_memory       all train within the bytes that the base needs on a rank: the planner picks micro-batch and
                       schedule of recomputation, the global batch stays

A rule that a run cannot keep is a ValueError with the bound.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from sret_scale.config.ds_config import load_ds_config, precision_of, zero_stage_of
from sret_scale.config.run_config import ModelConfig, RunConfig
from sret_scale.memory import plan_for, predict_activations
from sret_scale.memory.config import stem_repeats_norms
from sret_scale.memory.planning.micro_batch import MAX_MICRO_BATCH, BatchSearch
from sret_scale.memory.planning.rank_state import format_bytes, state_bytes
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.model import describe

Match = Literal["equal_images", "equal_flops", "equal_parameters", "equal_memory"]
PARAMETER_TOLERANCE = 0.01
"""Widths are whole numbers of channels, so a number of parameters can be met only so far."""
MLP_RATIO_RANGE = (0.5, 2.0)
"""How far equal_parameters may move a feed-forward's width from the base's, to hit between two widths."""
_CHOSEN_BY_PARAMETERS = ("width", "mlp_ratio")
_CHOSEN_BY_MEMORY = ("micro_batch_size", "schedule", "slots", "budget_bytes")


@functools.cache
def counts(model: ModelConfig) -> dict[str, Any]:
    """`describe`, once for all seeds and rates of a model."""
    return describe(model)


def matched(
    config: RunConfig, base: RunConfig, rule: Match, *, varied: Collection[str], ranks_of_nodes: Sequence[int]
) -> RunConfig:
    """`config` changed so that it is equal to `base` in what the rule names. `varied` are the fields the run sets."""
    assert rule in get_args(Match)
    if rule == "equal_flops":
        budget = counts(base.model)["macs"] * base.train.total_images
        try:
            return with_images(config, round(budget / counts(config.model)["macs"]))
        except ValueError as error:
            raise ValueError(f"equal_flops: {error}") from error
    if rule == "equal_parameters":
        _require_free(rule, varied, _CHOSEN_BY_PARAMETERS)
        return replace(config, model=with_parameters(config.model, counts(base.model)["parameters"]))
    if rule == "equal_memory":
        _require_free(rule, varied, _CHOSEN_BY_MEMORY)
        num_ranks = sum(ranks_of_nodes)
        return within_memory(config, memory_of(base, num_ranks), num_ranks)
    return config


def _require_free(rule: str, varied: Collection[str], chosen: Collection[str]) -> None:
    taken = [key for key in varied if key.rpartition(".")[2] in chosen]
    if taken:
        raise ValueError(f"{rule} chooses {taken[0]} itself: leave it out of the run, or choose another `match`")


def with_images(config: RunConfig, total_images: int) -> RunConfig:
    """The same course over another number of images: warm-up, averaging, evaluations and checkpoints scale with it.

    Raises ValueError where not even one global batch would be left.
    """
    if total_images < config.train.global_batch_size:
        raise ValueError(
            f"{total_images:,} images are left, less than one global batch of {config.train.global_batch_size}: give "
            "the base more images, or leave this depth out"
        )
    ratio = total_images / config.train.total_images
    return replace(
        config,
        train=replace(
            config.train,
            total_images=total_images,
            eval_interval_images=round(config.train.eval_interval_images * ratio),
            checkpoint_interval_images=round(config.train.checkpoint_interval_images * ratio),
        ),
        optim=replace(
            config.optim,
            warmup_images=round(config.optim.warmup_images * ratio),
            ema_horizon_images=round(config.optim.ema_horizon_images * ratio),
        ),
    )


def with_parameters(model: ModelConfig, parameters: int) -> ModelConfig:
    """The model with all widths scaled alike, and then its feed-forwards, to within 1 % of `parameters`.

    Heads, loops and the ratios between stages stay. Raises ValueError where the nearest choice is further away.
    """
    unit = _width_unit(model)
    narrow = max(1, round(model.stages[0].width * (parameters / counts(model)["parameters"]) ** 0.5 / unit))
    # Parameters grow with the square of the width, nearly: the two widths around `parameters` are close to the guess.
    while narrow > 1 and counts(_scaled(model, narrow * unit))["parameters"] > parameters:
        narrow -= 1
    while counts(_scaled(model, (narrow + 1) * unit))["parameters"] <= parameters:
        narrow += 1
    allowed = PARAMETER_TOLERANCE * parameters

    def distance(choice: ModelConfig) -> tuple[float, float]:
        """Of those near enough, the one whose feed-forwards change least."""
        changed = choice.stages[0].mlp_ratio / model.stages[0].mlp_ratio
        return max(allowed, abs(counts(choice)["parameters"] - parameters)), abs(math.log(changed))

    # Widths alone step by a quarter of the parameters where they are small.
    nearest = min(
        (_with_ratio(_scaled(model, width * unit), parameters) for width in (narrow, narrow + 1)), key=distance
    )
    found = counts(nearest)["parameters"]
    if abs(found - parameters) > allowed:
        widths = "/".join(str(stage.width) for stage in nearest.stages)
        raise ValueError(
            f"equal_parameters: the nearest model has {found:,} parameters at widths {widths}, the base has "
            f"{parameters:,} and {PARAMETER_TOLERANCE:.0%} is allowed: give the base more, share the projections, or "
            "leave this depth out"
        )
    return nearest


def _width_unit(model: ModelConfig) -> int:
    """The smallest step of the first width that keeps all widths whole multiples of their heads, and the first even."""
    first = model.stages[0].width
    ratios = [stage.width // first for stage in model.stages]
    pairs = zip(model.stages, ratios, strict=True)
    return math.lcm(2, *(stage.num_heads // math.gcd(stage.num_heads, ratio) for stage, ratio in pairs))


def _scaled(model: ModelConfig, first_width: int, ratio: float = 1.0) -> ModelConfig:
    """The model at another first width, the feed-forwards' ratio multiplied."""
    before = model.stages[0].width
    stages = tuple(
        replace(stage, width=stage.width // before * first_width, mlp_ratio=stage.mlp_ratio * ratio)
        for stage in model.stages
    )
    return replace(model, stages=stages)


def _with_ratio(model: ModelConfig, parameters: int) -> ModelConfig:
    """The model with the feed-forward ratio, within MLP_RATIO_RANGE, that comes nearest to `parameters`."""
    width = model.stages[0].width
    low, high = MLP_RATIO_RANGE
    # Linear in the ratio but for the rounding of hidden channels.
    fewest, most = (counts(_scaled(model, width, ratio))["parameters"] for ratio in (low, high))
    wanted = low + (high - low) * (parameters - fewest) / (most - fewest)
    return _scaled(model, width, round(min(high, max(low, wanted)), 4))


def memory_of(config: RunConfig, world_size: int) -> int:
    """Bytes that a run needs on a rank: its budget, or what is predicted for state and activations together.

    world_size: the ranks that train.
    """
    if config.memory.budget_bytes is not None:
        return config.memory.budget_bytes
    ds_config = load_ds_config(config.engine.ds_config)
    zero_stage = zero_stage_of(ds_config)
    repeats_norms = stem_repeats_norms(config.memory, zero_stage)
    batches = _batches(config.model, precision_of(ds_config), repeats_norms)
    state = state_bytes(batches.any_costs, world_size=world_size, zero_stage=zero_stage)
    return state.total + predict_activations(
        config.model,
        config.memory,
        micro_batch_size=config.train.micro_batch_size,
        precision=precision_of(ds_config),
        repeats_norms=repeats_norms,
    )


@functools.cache
def _batches(model: ModelConfig, precision: str, repeats_norms: bool) -> BatchSearch:
    return BatchSearch(model, precision, DEVICES["cpu"], repeats_norms=repeats_norms)


def within_memory(config: RunConfig, budget_bytes: int, world_size: int) -> RunConfig:
    """The run under the planner, with the micro-batch of most modelled images per second within the budget.

    Raises ValueError where not even the smallest micro-batch fits.
    """
    ds_config = load_ds_config(config.engine.ds_config)
    zero_stage = zero_stage_of(ds_config)
    per_rank, remainder = divmod(config.train.global_batch_size, world_size)
    if remainder:
        raise ValueError(
            f"equal_memory: train.global_batch_size={config.train.global_batch_size} is not a multiple of the "
            f"{world_size} ranks that train"
        )
    memory = replace(config.memory, schedule="planned", slots=None, budget_bytes=budget_bytes)
    try:
        plan = plan_for(
            _batches(config.model, precision_of(ds_config), stem_repeats_norms(memory, zero_stage)),
            budget_bytes=budget_bytes,
            micro_batch_sizes=[size for size in range(1, min(per_rank, MAX_MICRO_BATCH) + 1) if per_rank % size == 0],
            world_size=world_size,
            zero_stage=zero_stage,
        )
    except ValueError as error:
        raise ValueError(f"equal_memory: the base needs {format_bytes(budget_bytes)} on a rank; {error}") from error
    return replace(config, memory=memory, train=replace(config.train, micro_batch_size=plan.micro_batch_size))
