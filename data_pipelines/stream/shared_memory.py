"""Memory that processes share: bytes, and the columns of a batch in them.

It has no name in a file system: it is a file of the kernel's (memfd) that another process opens through its owner, so
nothing is left behind however either ends.
"""

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLUMNS = {
    "labels": ("<i8", ()),
    "indices": ("<i8", ()),
    "repeats": ("<i8", ()),
    "view_numbers": ("<i4", ()),
    "views": ("<i4", (5,)),
}


def _row_type(image_size: int) -> list[tuple[str, str, tuple[int, ...]]]:
    return [*((name, *facts) for name, facts in _COLUMNS.items()), ("images", "u1", (3, image_size, image_size))]


def shared_columns(memory: mmap.mmap, num_rows: int, image_size: int) -> dict[str, NDArray[Any]]:
    """The columns of a shared batch, one behind another."""
    columns: dict[str, NDArray[Any]] = {}
    offset = 0
    for name, kind, shape in _row_type(image_size):
        columns[name] = np.ndarray((num_rows, *shape), kind, memory, offset)
        offset += columns[name].nbytes
    return columns


class SharedMemory:
    """Bytes that other processes can map by `name`. Raises OSError when there is no memory for them."""

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
        # Fails here rather than by a signal at the first write.
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        self.name = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.map = mmap.mmap(self._descriptor, num_bytes)

    def close(self) -> None:
        """The memory itself goes with the last array that uses it."""
        os.close(self._descriptor)


class SharedBatch:
    """Memory for one batch. Raises OSError when there is none for it."""

    def __init__(self, num_rows: int, image_size: int) -> None:
        self._memory = SharedMemory(num_rows * np.dtype(_row_type(image_size)).itemsize)
        self.name = self._memory.name
        self.num_rows = num_rows
        self.columns = shared_columns(self._memory.map, num_rows, image_size)

    def close(self) -> None:
        self.columns = {}
        self._memory.close()


def map_shared(name: str) -> mmap.mmap:
    """The shared memory `name` of another process."""
    descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
