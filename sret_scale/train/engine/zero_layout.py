"""Which slice of which flat tensor a rank holds of each parameter, at every ZeRO stage.

ZeRO lays the parameters of a group end to end and cuts the whole over the ranks, so one tensor of the optimiser holds
many parameters, some of them in part. An update rule that treats parameters one by one needs to know where each lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    if zero_stage == 3:
        return {
            owner: tuple(_end_to_end(group, names, rank))
            for owner, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        }
    owners = optimizer.single_partition_of_fp32_groups
    return {
        # DeepSpeed may place the parameters of a group in another order than it lists them (round_robin_gradients).
        owner: tuple(sorted(_fragments(group, names), key=lambda part: part.start))
        for owner, group in zip(owners, optimizer.bit16_groups, strict=True)
    }


def _end_to_end(group: Sequence[Any], names: Mapping[nn.Parameter, str], rank: int) -> Iterator[Part]:
    start = 0
    for parameter in group:
        room = parameter.ds_tensor.numel()
        # The rest is padding that nobody ever wrote to: a norm must not see it.
        length = max(0, min(room, parameter.ds_numel - rank * room))
        yield Part(name=names[parameter], start=start, length=length)
        start += room


def _fragments(group: Sequence[Any], names: Mapping[nn.Parameter, str]) -> Iterator[Part]:
    for parameter in group:
        # None where the whole parameter lies on other ranks.
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.hp_fragment_address
            yield Part(name=names[parameter], start=place.start, length=place.numel)


def gradient_chunks(zero_stage: int, optimizer: Any, layout: Layout, is_offloaded: bool) -> dict[Tensor, list[Tensor]]:
    """The gradient of every tensor of `layout` as live tensors that make it up, end to end; after the last backward."""
    if zero_stage == 0 or is_offloaded:
        return {owner: [] if owner.grad is None else [owner.grad] for owner in layout}
    return {owner: list(optimizer.averaged_gradients[index]) for index, owner in enumerate(layout)}


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
