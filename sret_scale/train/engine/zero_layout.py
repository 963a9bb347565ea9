"""Which fragment of which flat tensor a rank holds of each parameter, at every ZeRO stage.

ZeRO lays the parameters of a group end to end and cuts the whole over the ranks, so one tensor of the optimiser holds
many parameters, some of them in part. An update rule that treats parameters one by one needs to know where each lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sret_scale.train.engine import deepspeed_internals


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [start, start + length) of a flat tensor belong to this parameter."""

    name: str
    start: int
    length: int


Layout = dict[Tensor, tuple[Fragment, ...]]
"""Tensor that the optimiser updates -> the parameters in it, in the order of their places."""


def layout_of(zero_stage: int, optimizer: Any, names: Mapping[nn.Parameter, str], *, rank: int) -> Layout:
    """The layout of this rank.

    optimizer: DeepSpeed's ZeRO optimiser, or at stage 0 whatever has `param_groups`.
    """
    if zero_stage == 0:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        return {value: (Fragment(name=names[value], start=0, length=value.numel()),) for value in parameters}
    owners = deepspeed_internals.flat_weights(optimizer, zero_stage)
    groups = deepspeed_internals.listed_parameters(optimizer, zero_stage)
    if zero_stage == 3:
        return {owner: tuple(_end_to_end(group, names, rank)) for owner, group in zip(owners, groups, strict=True)}
    return {
        # DeepSpeed may place the parameters of a group in another order than it lists them (round_robin_gradients).
        owner: tuple(sorted(_fragments(group, names), key=lambda fragment: fragment.start))
        for owner, group in zip(owners, groups, strict=True)
    }


def _end_to_end(group: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str], rank: int) -> Iterator[Fragment]:
    start = 0
    for parameter in group:
        own, shape = deepspeed_internals.stage_3_fragment(parameter), deepspeed_internals.stage_3_shape(parameter)
        assert own is not None and shape is not None
        room = own.numel()
        # The rest is padding that nobody ever wrote to: a norm must not see it.
        length = max(0, min(room, shape.numel() - rank * room))
        yield Fragment(name=names[parameter], start=start, length=length)
        start += room


def _fragments(group: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    for parameter in group:
        if place := deepspeed_internals.own_fragment(parameter):
            yield Fragment(name=names[parameter], start=place[0], length=place[1])


def live_gradients(zero_stage: int, optimizer: Any, layout: Layout, is_offloaded: bool) -> dict[Tensor, list[Tensor]]:
    """The gradient of every tensor of `layout` as live tensors that make it up, end to end; after the last backward."""
    if zero_stage == 0 or is_offloaded:
        return {owner: [] if owner.grad is None else [owner.grad] for owner in layout}
    return {owner: deepspeed_internals.averaged_gradients(optimizer, index) for index, owner in enumerate(layout)}


def fragment_views(tensors: Sequence[Tensor], fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, Tensor]]:
    """Flat views of each fragment in `tensors`, which lie end to end; one that crosses a border comes in several.

    fragments: in the order of their places. One pass over both: every step does this for all parameters.
    """
    size = tensors[0].numel() if len(tensors) == 1 else 0
    if size and len(fragments) == 1 and (fragments[0].start, fragments[0].length) == (0, size):
        yield fragments[0], tensors[0].view(-1)
        return
    start, index = 0, 0
    for tensor in tensors:
        flat = tensor.view(-1)
        end = start + flat.numel()
        while index < len(fragments) and fragments[index].start < end:
            fragment = fragments[index]
            stop = fragment.start + fragment.length
            low, high = max(start, fragment.start), min(end, stop)
            if low < high:
                yield fragment, flat[low - start : high - start]
            if stop > end:
                break
            index += 1
        start = end
