"""A run's state at one moment: copied at once on every rank, put together to whole tensors later, on rank 0.

ZeRO leaves each rank a part of the state. What a rank has is described by pieces (live tensors, no copies); a snapshot
copies them into one buffer that is kept between saves: the first touch of fresh memory costs ten times the copy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPARE_VALUES = 1 << 16
"""Room for what only some saves have: BatchNorm's statistics of the average."""
Gather = Callable[[Tensor], list[Tensor]]
"""This rank's part -> on rank 0 the equal parts of all ranks, elsewhere nothing."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A tensor `name` of `set_name` that begins at `start` of its piece, the parts of all ranks laid end to end."""

    set_name: str
    name: str
    shape: torch.Size
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Live values of a rank. A part belongs to one whole over all ranks; what is no part is the same on each."""

    values: Tensor
    is_part: bool
    fields: tuple[Field, ...]


@dataclass(kw_only=True)
class Snapshot:
    """Copies of the pieces that a rank has to give to a checkpoint: its parts, and on rank 0 all else.

    `buffer` is reused where it fits; nobody else may use it until `whole` has returned.
    """

    is_main: bool
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def take(self, pieces: Iterable[Piece]) -> None:
        """Copy the pieces now; later changes of the live values do not reach the copies."""
        # Parts first, so that one gather takes them all.
        kept = sorted(self._kept(pieces), key=lambda piece: not piece.is_part)
        self._floats = [piece for piece in kept if piece.values.dtype == torch.float32]
        # BatchNorm's integer counters: a few bytes, which fit into no buffer of floats.
        others = [piece for piece in kept if piece.values.dtype != torch.float32]
        assert not any(piece.is_part for piece in others)
        self._others = [(piece.fields[0], piece.values.detach().to("cpu", copy=True)) for piece in others]
        sizes = [piece.values.numel() for piece in self._floats]
        is_cuda = any(piece.values.is_cuda for piece in self._floats)
        if self.buffer.numel() < sum(sizes):
            self.buffer = torch.empty(sum(sizes), pin_memory=is_cuda)
        for place, piece in zip(torch.split(self.buffer[: sum(sizes)], sizes), self._floats, strict=True):
            place.copy_(piece.values.detach().flatten(), non_blocking=True)
        self._is_copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._is_copied:
            # The stream runs the copies before the next step's kernels; only a reader has to wait for them.
            self._is_copied.record()

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Make the buffer that copies of such pieces need, and touch it: the first copy is then as fast as others."""
        floats = [piece.values for piece in self._kept(pieces) if piece.values.dtype == torch.float32]
        size = sum(values.numel() for values in floats) + SPARE_VALUES
        self.buffer = torch.zeros(size, pin_memory=any(values.is_cuda for values in floats))

    def _kept(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        return (piece for piece in pieces if piece.is_part or self.is_main)

    def whole(self, gather: Gather) -> dict[str, dict[str, Tensor]]:
        """The named sets of whole tensors, on the CPU, on rank 0; elsewhere empty. All ranks must call it."""
        if self._is_copied:
            self._is_copied.synchronize()
        num_in_parts = sum(piece.values.numel() for piece in self._floats if piece.is_part)
        parts = gather(self.buffer[:num_in_parts]) if num_in_parts else []
        sets: dict[str, dict[str, Tensor]] = {}
        if self.is_main:
            for entry, value in self._whole_fields(parts):
                sets.setdefault(entry.set_name, {})[entry.name] = value
        return sets

    def _whole_fields(self, parts: list[Tensor]) -> Iterator[tuple[Field, Tensor]]:
        place = 0
        for piece in self._floats:
            sources = parts if piece.is_part else [self.buffer]
            end = place + piece.values.numel()
            flat = torch.cat([source[place:end] for source in sources])
            for entry in piece.fields:
                yield entry, flat[entry.start : entry.start + entry.shape.numel()].view(entry.shape)
            place = end
        yield from self._others
