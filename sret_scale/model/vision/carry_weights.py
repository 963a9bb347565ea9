"""Carries weights from one config to another: more or fewer loops, or another image size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.model.applications import application_slots
from sret_scale.model.config import StackConfig


def adapted_state(
    state: dict[str, Tensor], before: StackConfig, after: StackConfig, fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of `after` that holds the weights of `before`; `fresh` is that of a new model of `after`.

    A projection of a loop that `before` lacks keeps its fresh weights with a branch coefficient of 0, so it starts as
    the identity; conditioning on such a loop starts as that of the last known one. The position tensor is interpolated.
    """
    sources = _projection_sources(before, after)
    return {name: _carried(name, value, state, sources) for name, value in fresh.items()}


def new_projections(before: StackConfig, after: StackConfig) -> list[str]:
    """Names of the projections that `after` has for loops that `before` lacks: nobody has trained them."""
    return [name for name, source in _projection_sources(before, after).items() if source is None]


def resized_position(position_1DHW: Tensor, side: int) -> Tensor:
    """The position tensor on a grid of another side (bicubic, antialiased when it shrinks)."""
    if position_1DHW.shape[-1] == side:
        return position_1DHW
    resized = F.interpolate(position_1DHW.float(), size=(side, side), mode="bicubic", antialias=True)
    return resized.to(position_1DHW.dtype)


def _projection_sources(before: StackConfig, after: StackConfig) -> dict[str, str | None]:
    """Name prefix of each projection in `after` -> the one in `before` that it continues, None for a new one."""
    sources: dict[str, str | None] = {}
    for index in range(len(after.stages)):
        known = {(slot.block, slot.loop): slot.projection for slot in application_slots(before, index)}
        for slot in application_slots(after, index):
            source = known.get((slot.block, slot.loop))
            prefix = f"stages.{index}.projections."
            # A projection shared by loops continues the old one through whichever of its loops is known.
            if slot.projection is not None and sources.get(f"{prefix}{slot.projection}.") is None:
                sources[f"{prefix}{slot.projection}."] = None if source is None else f"{prefix}{source}."
    return sources


def _carried(name: str, fresh: Tensor, state: dict[str, Tensor], sources: dict[str, str | None]) -> Tensor:
    if name == "position":
        return resized_position(state[name], fresh.shape[-1])
    parts = name.split(".")
    if parts[0] == "stages" and parts[2] == "projections":
        prefix = ".".join(parts[:4]) + "."
        source = sources[prefix]
        if source is not None:
            return state[source + name.removeprefix(prefix)]
        return torch.zeros_like(fresh) if name.endswith("residual.beta") else fresh
    value = state[name]
    if value.shape != fresh.shape and "conditioning" in parts:
        kept = value[: len(fresh)]
        return torch.cat([kept, kept[-1:].expand(len(fresh) - len(kept), *kept.shape[1:])])
    return value
