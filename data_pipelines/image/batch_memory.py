"""Memory of batches that is used again: fresh memory costs a page fault every 4 KiB, more than filling it."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Recycler:
    """Gives tensors whose memory comes back when the last tensor, view or array over it is gone. Safe for threads.

    It holds as many as were in use at once. Memory that is used again has what was in it before.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with any content."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        free = self._free.setdefault(num_bytes, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(num_bytes, np.uint8)
        # The tensor's storage keeps this array, so it ends with the storage; `memory` outlives it.
        lent = memory.view()
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))
