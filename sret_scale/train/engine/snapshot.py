"""A run's state at one moment: copied at once on every rank, put together to whole tensors later, on rank 0.

ZeRO leaves each rank a fragment of the state. What a rank has is described by its live tensors, no copies; a snapshot
copies them into one buffer that is kept between saves: the first touch of fresh memory costs ten times the copy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPARE_VALUES = 1 << 16
"""Room for what only some saves have: BatchNorm's statistics of the average."""
Gather = Callable[[Tensor], list[Tensor]]
"""This rank's fragment -> on rank 0 the equal fragments of all ranks, elsewhere nothing."""


@dataclass(frozen=True, kw_only=True)
class WholeTensor:
    """The tensor `name` of `set_name`; it begins at `start` of what the fragments of all ranks are, end to end."""

    set_name: str
    name: str
    shape: torch.Size
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class RankTensor:
    """Live values of a rank. A fragment belongs to one whole over all ranks; what is none is the same on each."""

    values: Tensor
    is_fragment: bool
    wholes: tuple[WholeTensor, ...]


@dataclass(kw_only=True)
class Snapshot:
    """Copies of the tensors that a rank has to give to a checkpoint: its fragments, and on rank 0 all else.

    `buffer` is reused where it fits; nobody else may use it until `whole` has returned.
    """

    is_main: bool
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def take(self, tensors: Iterable[RankTensor]) -> None:
        """Copy the tensors now; later changes of the live values do not reach the copies."""
        # Fragments first, so that one gather takes them all.
        kept = sorted(self._kept(tensors), key=lambda tensor: not tensor.is_fragment)
        self._floats = [tensor for tensor in kept if tensor.values.dtype == torch.float32]
        # BatchNorm's integer counters: a few bytes, which fit into no buffer of floats.
        others = [tensor for tensor in kept if tensor.values.dtype != torch.float32]
        assert not any(tensor.is_fragment for tensor in others)
        self._others = [(tensor.wholes[0], tensor.values.detach().to("cpu", copy=True)) for tensor in others]
        sizes = [tensor.values.numel() for tensor in self._floats]
        is_cuda = any(tensor.values.is_cuda for tensor in self._floats)
        if self.buffer.numel() < sum(sizes):
            self.buffer = torch.empty(sum(sizes), pin_memory=is_cuda)
        for place, tensor in zip(torch.split(self.buffer[: sum(sizes)], sizes), self._floats, strict=True):
            place.copy_(tensor.values.detach().flatten(), non_blocking=True)
        self._is_copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._is_copied:
            # The stream runs the copies before the next step's kernels; only a reader has to wait for them.
            self._is_copied.record()

    def reserve(self, tensors: Iterable[RankTensor]) -> None:
        """Make the buffer that copies of such tensors need, and touch it: the first copy is then as fast as others."""
        floats = [tensor.values for tensor in self._kept(tensors) if tensor.values.dtype == torch.float32]
        size = sum(values.numel() for values in floats) + SPARE_VALUES
        self.buffer = torch.zeros(size, pin_memory=any(values.is_cuda for values in floats))

    def _kept(self, tensors: Iterable[RankTensor]) -> Iterator[RankTensor]:
        return (tensor for tensor in tensors if tensor.is_fragment or self.is_main)

    def whole(self, gather: Gather) -> dict[str, dict[str, Tensor]]:
        """The named sets of whole tensors, on the CPU, on rank 0; elsewhere empty. All ranks must call it."""
        if self._is_copied:
            self._is_copied.synchronize()
        num_in_fragments = sum(tensor.values.numel() for tensor in self._floats if tensor.is_fragment)
        fragments = gather(self.buffer[:num_in_fragments]) if num_in_fragments else []
        sets: dict[str, dict[str, Tensor]] = {}
        if self.is_main:
            for entry, value in self._wholes(fragments):
                sets.setdefault(entry.set_name, {})[entry.name] = value
        return sets

    def _wholes(self, fragments: list[Tensor]) -> Iterator[tuple[WholeTensor, Tensor]]:
        place = 0
        for tensor in self._floats:
            sources = fragments if tensor.is_fragment else [self.buffer]
            end = place + tensor.values.numel()
            flat = torch.cat([source[place:end] for source in sources])
            for entry in tensor.wholes:
                yield entry, flat[entry.start : entry.start + entry.shape.numel()].view(entry.shape)
            place = end
        yield from self._others
