"""The interface of a task: all that loop, telemetry and evaluation know of what a run learns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_pipelines.stream.loader import Batch


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One micro-batch on its device.

    model_input: what the model is called with, batch first.
    target: what its scores are compared with, batch first.
    teacher_log_probs: a teacher's log-probabilities for it, where there is a teacher.
    """

    model_input: Tensor
    target: Tensor
    teacher_log_probs: Tensor | None = None


class Task(Protocol):
    """What a run learns."""

    unit: str
    """What the clock counts, in the plural."""
    best: str
    """The number of an evaluation that is best where it is largest."""
    best_in_words: str

    def inputs(self, batch: Batch, *, seed: int, device: torch.device) -> Inputs:
        """A batch as the model trains on it, a function of its samples and the seed."""

    def loss(self, scores: Tensor, inputs: Inputs, *, progress: float, loops: int, part: slice = slice(None)) -> Tensor:
        """The mean loss of scores for the samples of `part`.

        progress: the share of the run that lies behind; loops: those of the last stage that the scores come after.
        """

    def added_loss(self, *, progress: float) -> Tensor | None:
        """What the last forward pass adds to the loss beside its scores."""

    def evaluation_input(self, batch: Batch, device: torch.device) -> Tensor:
        """A batch as the model is evaluated on it."""

    def counts(self, scores: Tensor, batch: Batch) -> Tensor:
        """(B, counts) float64: what sums over all samples are made of, 1 first; zeros where a row only fills up."""

    def numbers(self, counts: list[float]) -> dict[str, float]:
        """The named results of summed counts."""
