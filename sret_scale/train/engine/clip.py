"""Norms of the gradient by parameter class, and clipping by them, over all ranks and at every ZeRO stage.

DeepSpeed clips by one norm and leaves NaN to chance at stage 0. Here every rank adds up what it holds, one all-reduce
makes the sums the same bits everywhere, and so is all that follows from them: the factors, the parameters that took no
part, and whether the update is made at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sret_scale.model.upload import uploaded
from sret_scale.train.distributed import sum_over_ranks
from sret_scale.train.engine.zero_layout import Layout, fragment_views


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """L2 norms before clipping, and the parameters that received no gradient on any rank."""

    by_class: Mapping[str, float]
    unused: frozenset[str]

    @property
    def total(self) -> float:
        """The norm over all parameters."""
        return math.hypot(*self.by_class.values())

    @property
    def is_finite(self) -> bool:
        """False where any element of the gradient is infinite or not a number."""
        return math.isfinite(self.total)


@torch.no_grad()
def measure(
    gradients: Mapping[Tensor, Sequence[Tensor]],
    layout: Layout,
    groups: Sequence[Mapping[str, Any]],
    *,
    used: set[str],
    num_copies: int,
    loss_scale: float,
    device: torch.device,
) -> GradientNorms:
    """The norms of a gradient that was multiplied by `loss_scale`; every rank must call it.

    gradients: this rank's gradients (`zero_layout.live_gradients`).
    used: parameters that received a gradient on this rank.
    num_copies: how many ranks hold the same gradient: all where it is whole, 1 where it is cut.
    """
    names = [name for group in groups for name in group["names"]]
    place = {name: index for index, name in enumerate(names)}
    views = [found for owner, tensors in gradients.items() for found in fragment_views(tensors, layout[owner])]
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    if views:
        norms = torch.stack(torch._foreach_norm([values for _, values in views])).to(device, torch.float64)
        index = uploaded(torch.tensor([place[part.name] for part, _ in views]), device)
        sums[0].index_add_(0, index, (norms / loss_scale).square() / num_copies)
    sums[1] = uploaded(torch.tensor([float(name in used) for name in names]), device)
    squares, uses = sum_over_ranks(sums).tolist()
    unused = frozenset(name for name, count in zip(names, uses, strict=True) if not count)
    by_class: dict[str, float] = {}
    for group in groups:
        # What nobody computed may hold the gradient of an earlier step.
        terms = (squares[place[name]] for name in group["names"] if name not in unused)
        by_class[group["kind"]] = by_class.get(group["kind"], 0.0) + sum(terms)
    return GradientNorms(by_class={kind: math.sqrt(square) for kind, square in by_class.items()}, unused=unused)


def clip_factors(norms: GradientNorms, groups: Sequence[Mapping[str, Any]], *, common_bound: float) -> dict[str, float]:
    """Class -> factor of its gradient.

    A class with a `clip_norm` is clipped by its own norm; all others by their common one at `common_bound` (0 is off).
    """
    own_bounds = {group["kind"]: group["clip_norm"] for group in groups}
    common = math.hypot(*(norm for kind, norm in norms.by_class.items() if own_bounds[kind] is None))
    return {
        kind: _factor(common, common_bound) if own_bounds[kind] is None else _factor(norm, own_bounds[kind])
        for kind, norm in norms.by_class.items()
    }


def _factor(norm: float, bound: float) -> float:
    # As torch's clip_grad_norm_ has it.
    return min(1.0, bound / (norm + 1e-6)) if bound else 1.0


@torch.no_grad()
def scale_gradients(
    gradients: Mapping[Tensor, Sequence[Tensor]],
    layout: Layout,
    groups: Sequence[Mapping[str, Any]],
    factors: Mapping[str, float],
) -> None:
    """Multiply this rank's gradients by the factor of their class, in place."""
    kinds = {name: group["kind"] for group in groups for name in group["names"]}
    of_factor: dict[float, list[Tensor]] = {}
    for owner, tensors in gradients.items():
        # A tensor of the optimiser holds parameters of one group; one without any is padding.
        factor = factors[kinds[layout[owner][0].name]] if layout[owner] else 1.0
        if factor != 1.0:
            of_factor.setdefault(factor, []).extend(tensors)
    for factor, scaled in of_factor.items():
        if scaled:
            torch._foreach_mul_(scaled, factor)
