"""Where kept boundaries wait: in the memory of the device, or in host memory with copies beside the computation."""

import functools
from typing import Protocol

import torch
from torch import Tensor


class Slots(Protocol):
    """Kept boundaries by index."""

    def put(self, index: int, boundary: Tensor) -> None:
        """Keeps a boundary."""

    def take(self, index: int) -> Tensor:
        """The boundary, on its device; its slot is free afterwards."""

    def prefetch(self, index: int) -> None:
        """Begins to fetch a boundary that will be taken soon; nothing if it is not kept."""


class DeviceSlots:
    """Boundaries stay where they are; one that was changed meanwhile raises ValueError when it is taken."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def put(self, index: int, boundary: Tensor) -> None:
        """Keeps a boundary."""
        self._kept[index] = boundary, boundary._version

    def take(self, index: int) -> Tensor:
        """The boundary, if it still has its values."""
        boundary, version = self._kept.pop(index)
        require_unchanged(boundary, version)
        return boundary

    def prefetch(self, index: int) -> None:
        """Nothing: it is here."""


def require_unchanged(boundary: Tensor, version: int) -> None:
    """ValueError if the boundary was changed in place since it had this version."""
    if boundary._version != version:
        raise ValueError("the input of a chain was changed in place before its backward pass: change a copy instead")


class HostSlots:
    """Boundaries are copied to host memory. On CUDA it is pinned, and a side stream copies while kernels run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        self._kept: dict[int, Tensor] = {}
        self._fetched: dict[int, Tensor] = {}

    def put(self, index: int, boundary: Tensor) -> None:
        """Begins to copy a boundary to the host."""
        host = torch.empty(boundary.shape, dtype=boundary.dtype, pin_memory=self._stream is not None)
        self._copy(boundary, host)
        if self._stream is not None:
            boundary.record_stream(self._stream)
        self._kept[index] = host

    def take(self, index: int) -> Tensor:
        """The boundary, copied back."""
        self.prefetch(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._fetched.pop(index)

    def prefetch(self, index: int) -> None:
        """Begins to copy a boundary back, if it is kept."""
        if index not in self._kept:
            return
        boundary = host = self._kept.pop(index)
        if self._stream is not None:
            # Born on the stream that computes: torch keeps what is freed apart for each stream, and memory of the side
            # stream would lie idle between its copies.
            boundary = torch.empty_like(host, device=self._device)
            self._copy(host, boundary)
            boundary.record_stream(self._stream)
        self._fetched[index] = boundary

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """In the side stream, after all work that has been launched so far; on other devices at once."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream of a device: one for all chains, since torch has few and lends each to many."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
