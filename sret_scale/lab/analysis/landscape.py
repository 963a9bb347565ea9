"""The loss around a minimum along two random directions, filter-normalised (Li et al., arXiv 1712.09913, section 4).

Each row of a weight (a filter, a neuron) gets a random direction of its own norm, so that surfaces of models whose
weights differ in scale can be compared. Vectors (biases, norms, coefficients) do not move, as in the paper.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sret_scale.lab.analysis.subject import Subject, measure
from sret_scale.runs.metrics_log import Floats

Direction = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """`loss[i, j]` at `along[i]` times the first and `along[j]` times the second direction; top1 alike (ratios)."""

    name: str
    applications: int
    along: Floats
    loss: Floats
    top1: Floats


def normalised_direction(model: nn.Module, seed: int) -> Direction:
    """A random direction in the space of the weights: row by row of the norm of the model's own row."""
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        rows = tuple(range(1, weight.ndim))
        norms = torch.linalg.vector_norm(drawn, dim=rows, keepdim=True)
        own = torch.linalg.vector_norm(weight.detach(), dim=rows, keepdim=True)
        direction[name] = drawn * (own / norms)
    return direction


def landscape(subject: Subject, *, points: int, reach: float, seed: int) -> Landscape:
    """The surface on a grid of `points` x `points` from -reach to reach; the model ends as it was.

    Raises ValueError unless `points` is odd (the minimum itself is on the grid) and `reach` above 0.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"--points: expected an odd number of at least 3, got {points}")
    if not 0 < reach < float("inf"):
        raise ValueError(f"--reach: expected a number above 0, got {reach}")
    model = subject.model
    first, second = (normalised_direction(model, 2 * seed + place) for place in (0, 1))
    origin = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in first}
    along = np.linspace(-reach, reach, points)
    along[points // 2] = 0.0
    loss, top1 = np.empty((points, points)), np.empty((points, points))
    try:
        for i, a in enumerate(along):
            for j, b in enumerate(along):
                _move(model, origin, {name: a * first[name] + b * second[name] for name in first})
                loss[i, j], top1[i, j] = measure(model, subject)
    finally:
        _move(model, origin, {})
    applications = model.config.num_applications
    return Landscape(name=subject.name, applications=applications, along=along, loss=loss, top1=top1)


@torch.no_grad()
def _move(model: nn.Module, origin: Direction, shift: Direction) -> None:
    weights = dict(model.named_parameters())
    for name, value in origin.items():
        weights[name].copy_(value + shift[name] if name in shift else value)
