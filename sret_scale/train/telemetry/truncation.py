"""How close the gradient of truncated backpropagation is to the full one, per class of parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sret_scale.model import Noise, StackModel
from sret_scale.model.depth_plan import DepthPlan


def gradient_cosines(
    model: StackModel,
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
    ours, theirs = (gradients(model, images_BCHW, loss_of, noise, one)[1] for one in (cut, whole))
    return {kind: cosine(*([one[name] for name in own] for one in (ours, theirs))) for kind, own in kinds.items()}


def gradients(
    model: StackModel, images_BCHW: Tensor, loss_of: Callable[[Tensor], Tensor], noise: Noise | None, plan: DepthPlan
) -> tuple[float, dict[str, Tensor]]:
    """(loss at the plan's full depth, its gradient by parameter; zeros where there is none)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = loss_of(model(images_BCHW, noise, [plan])[0])
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
    return loss.item(), dict(zip(names, filled, strict=True))


def cosine(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Between two lists of tensors, each taken as one vector; NaN where one is zero."""
    product = sum(float((a * b).sum()) for a, b in zip(ours, theirs, strict=True))
    norms = [math.sqrt(sum(float(value.square().sum()) for value in side)) for side in (ours, theirs)]
    return product / (norms[0] * norms[1]) if all(norms) else math.nan
