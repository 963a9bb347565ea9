"""Which slice of which flat tensor a rank holds of each parameter, at every ZeRO stage.

ZeRO lays the parameters of a group end to end and cuts the whole over the ranks, so one tensor of the optimiser holds
many parameters, some of them in part. An update rule that treats parameters one by one needs to know where each lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sret_scale.train.engine.deepspeed_internals import (
    averaged_gradients,
    flat_weights,
    listed_parameters,
    own_fragment,
    stage_3_part,
    stage_3_shape,
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements [start, start + length) of a flat tensor belong to this parameter."""

    name: str
    start: int
    length: int


Layout = dict[Tensor, tuple[Part, ...]]
"""Tensor that the optimiser updates -> the parameters in it, in the order of their places."""


def layout_of(zero_stage: int, optimizer: Any, names: Mapping[nn.Parameter, str], *, rank: int) -> Layout:
    """The layout of this rank.

    optimizer: DeepSpeed's ZeRO optimiser, or at stage 0 whatever has `param_groups`.
    """
    if zero_stage == 0:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        return {value: (Part(name=names[value], start=0, length=value.numel()),) for value in parameters}
    owners = flat_weights(optimizer, zero_stage)
    groups = listed_parameters(optimizer, zero_stage)
    if zero_stage == 3:
        return {owner: tuple(_end_to_end(group, names, rank)) for owner, group in zip(owners, groups, strict=True)}
    return {
        # DeepSpeed may place the parameters of a group in another order than it lists them (round_robin_gradients).
        owner: tuple(sorted(_fragments(group, names), key=lambda part: part.start))
        for owner, group in zip(owners, groups, strict=True)
    }


def _end_to_end(group: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str], rank: int) -> Iterator[Part]:
    start = 0
    for parameter in group:
        own, shape = stage_3_part(parameter), stage_3_shape(parameter)
        assert own is not None and shape is not None
        room = own.numel()
        # The rest is padding that nobody ever wrote to: a norm must not see it.
        length = max(0, min(room, shape.numel() - rank * room))
        yield Part(name=names[parameter], start=start, length=length)
        start += room


def _fragments(group: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> Iterator[Part]:
    for parameter in group:
        if fragment := own_fragment(parameter):
            yield Part(name=names[parameter], start=fragment[0], length=fragment[1])


def gradient_chunks(zero_stage: int, optimizer: Any, layout: Layout, is_offloaded: bool) -> dict[Tensor, list[Tensor]]:
    """The gradient of every tensor of `layout` as live tensors that make it up, end to end; after the last backward."""
    if zero_stage == 0 or is_offloaded:
        return {owner: [] if owner.grad is None else [owner.grad] for owner in layout}
    return {owner: averaged_gradients(optimizer, index) for index, owner in enumerate(layout)}


def slices(chunks: Sequence[Tensor], parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
    """Flat views of each part in `chunks`, which lie end to end; a part that crosses a border comes in pieces.

    parts: in the order of their places. One pass over both: every step does this for all parameters.
    """
    if len(chunks) == len(parts) == 1 and parts[0].start == 0 and 0 < parts[0].length == chunks[0].numel():
        yield parts[0], chunks[0].view(-1)
        return
    start, index = 0, 0
    for chunk in chunks:
        flat = chunk.view(-1)
        end = start + flat.numel()
        while index < len(parts) and parts[index].start < end:
            part = parts[index]
            stop = part.start + part.length
            low, high = max(start, part.start), min(end, stop)
            if low < high:
                yield part, flat[low - start : high - start]
            if stop > end:
                break
            index += 1
        start = end
