"""How close the gradient of truncated backpropagation is to the full one, per class of parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sret_scale.model import Noise, SReT
from sret_scale.model.depth_plan import DepthPlan


def gradient_cosines(
    model: SReT,
    images_BCHW: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    noise: Noise,
    plan: DepthPlan,
    kinds: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """Cosine between the gradients with the plan's branches detached and with none, of the loss at its full depth.

    kinds: names of parameters by class. A parameter without a gradient counts as zeros; NaN where a class has none.
    """
    whole = DepthPlan(tuple(replace(stage, num_detached=0) for stage in plan.stages))
    cut = replace(plan, supervised=())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = []
    for one in (cut, whole):
        loss = loss_of(model(images_BCHW, noise, [one])[0])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(
            {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
        )
    return {kind: _cosine(*([one[name] for name in own] for one in gradients)) for kind, own in kinds.items()}


def _cosine(ours: list[Tensor], theirs: list[Tensor]) -> float:
    product = sum(float((a * b).sum()) for a, b in zip(ours, theirs, strict=True))
    norms = [math.sqrt(sum(float(value.square().sum()) for value in side)) for side in (ours, theirs)]
    return product / (norms[0] * norms[1]) if all(norms) else math.nan
