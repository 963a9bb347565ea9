"""Puts recomputation around the stages of an SReT, from outside the model."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from sret_scale.memory.config import MemoryConfig, schedule_for
from sret_scale.memory.recompute import Chained, run_chain


def apply_recomputation(model: nn.Module, config: MemoryConfig) -> None:
    """Makes every stage of `model.stages` run its applications under `config`; may be called again to change it."""
    for stage in model.stages:  # type: ignore[union-attr]
        stage.run_chain = partial(_run_configured, config)


def _run_configured(config: MemoryConfig, applications: Sequence[Chained], x: Tensor) -> Tensor:
    if not applications:
        return x
    return run_chain(applications, x, schedule_for(config, len(applications)), is_checked=config.is_checked)
