"""What each loop of a trained model is worth: its accuracy with the loop left out, repeated, or swapped with the next.

A change is made to that loop of every block of a stage. Tokens keep the order that the place in the chain gives, so
that a change of the loop is not also one of the slicing.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sret_scale.lab.analysis.subject import Subject, measure
from sret_scale.lab.readable_numbers import evenly
from sret_scale.model.stage import Application, chains_run_by

Change = Literal["left out", "repeated", "swapped"]
Chain = Sequence[Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Accuracy and loss after one change; `loop` of a swap is the earlier one."""

    stage: int
    loop: int
    change: Change
    top1: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class LoopStudy:
    """The unchanged model's accuracy and loss, and those of every change."""

    name: str
    top1: float
    loss: float
    effects: tuple[Effect, ...]


def study_loops(subject: Subject, *, most_loops: int) -> LoopStudy:
    """All changes to up to `most_loops` loops of each stage, spread evenly; the model ends as it was."""
    if most_loops < 1:
        raise ValueError(f"--loops: expected at least 1, got {most_loops}")
    loss, top1 = measure(subject.model, subject)
    effects = []
    for index, module in enumerate(subject.model.stages):
        num_loops = subject.model.config.stages[index].num_loops
        for loop in evenly(num_loops, most_loops):
            for change in get_args(Change):
                if change == "swapped" and loop + 1 == num_loops:
                    continue
                with chains_run_by([module], functools.partial(_runner, loop, change)):
                    changed_loss, changed_top1 = measure(subject.model, subject)
                effects.append(Effect(stage=index, loop=loop, change=change, top1=changed_top1, loss=changed_loss))
    return LoopStudy(name=subject.name, top1=top1, loss=loss, effects=tuple(effects))


def _runner(loop: int, change: Change, _stage: int) -> Callable[[Sequence[Application], Tensor], Tensor]:
    def run_chain(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for step in changed_chain(applications, loop, change):
            x_BND = step(x_BND)
        return x_BND

    return run_chain


def changed_chain(applications: Sequence[Application], loop: int, change: Change) -> Chain:
    """The chain with one loop of every block changed."""
    at = {(application.slot.block, application.slot.loop): application for application in applications}
    chain: list[Callable[[Tensor], Tensor]] = []
    for application in applications:
        block, own = application.slot.block, application.slot.loop
        if change == "swapped" and own in (loop, loop + 1):
            other = at[block, 2 * loop + 1 - own]
            chain.append(replace(application, slot=other.slot, projection=other.projection))
        elif change == "left out" and own == loop:
            chain.append(_passed(application))
        else:
            chain.append(application)
            if change == "repeated" and own == loop:
                chain.append(replace(application, gather=None, scatter=None))
    return chain


def _passed(application: Application) -> Callable[[Tensor], Tensor]:
    """Only the application's reordering of the tokens, which the next one builds upon."""
    if not application.injected:
        return application.reordered
    return lambda x_BND: torch.cat([application.reordered(part) for part in x_BND.chunk(2, dim=1)], dim=1)
