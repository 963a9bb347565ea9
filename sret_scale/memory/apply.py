"""Puts recomputation around the stages of a model, from outside it."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sret_scale.memory.config import MemoryConfig, schedule_for
from sret_scale.memory.recompute import Chained, run_chain
from sret_scale.memory.schedule import Schedule, shortened
from sret_scale.model.vision.stem import Stem


def apply_recomputation(model: nn.Module, config: MemoryConfig, *, repeats_norms: bool = False) -> None:
    """Makes every stage of `model.stages` run its applications under `config`; may be called again to change it.

    repeats_norms: the stem's (see `stem.Stem`). Not for ZeRO 3, where its parameters are away in the backward pass.
    """
    set_repeated_norms(model, repeats_norms)
    for stage in _stages(model):
        stage.run_chain = partial(_run_configured, config)


def apply_schedules(
    model: nn.Module,
    schedules: Sequence[Schedule],
    config: MemoryConfig,
    *,
    stage_of: Sequence[int] | None = None,
    repeats_norms: bool = False,
) -> None:
    """Makes each stage of `model.stages` run its own schedules; the other settings are those of `config`.

    stage_of: the stage of each schedule where stages run several chains in a pass; default: one each.
    A chain of fewer applications than its schedule has takes the shortened one (`schedule.shortened`).
    """
    set_repeated_norms(model, repeats_norms)
    places = range(len(schedules)) if stage_of is None else stage_of
    for index, stage in enumerate(_stages(model)):
        own = [schedule for schedule, place in zip(schedules, places, strict=True) if place == index]
        stage.run_chain = partial(_run_numbered, config, stage, own)


def set_repeated_norms(model: nn.Module, repeats_norms: bool) -> None:
    """Whether the stem, where a model has one, computes its norms again in the backward pass."""
    for module in model.modules():
        if isinstance(module, Stem):
            module.repeats_norms = repeats_norms


def _stages(model: nn.Module) -> Iterable[Any]:
    return model.stages  # type: ignore[return-value]


def _run_configured(config: MemoryConfig, applications: Sequence[Chained], x: Tensor) -> Tensor:
    return _run_scheduled(config, schedule_for(config, len(applications)), applications, x)


def _run_numbered(
    config: MemoryConfig, stage: Any, schedules: Sequence[Schedule], applications: Sequence[Chained], x: Tensor
) -> Tensor:
    schedule = schedules[stage.chain_number]
    if len(applications) > schedule.num_applications:
        # An evaluation, or a look at the gradient through more loops than are trained: nobody planned for it.
        return _run_configured(MemoryConfig(schedule="binomial"), applications, x)
    return _run_scheduled(config, schedule, applications, x)


def _run_scheduled(config: MemoryConfig, schedule: Schedule, applications: Sequence[Chained], x: Tensor) -> Tensor:
    if schedule.num_applications != len(applications):
        schedule = shortened(schedule, len(applications))
    return run_chain(applications, x, schedule, is_checked=config.is_checked, is_offloaded=config.is_offloaded)
