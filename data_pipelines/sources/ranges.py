"""Readers of images that lie as they are in files: whole files, or ranges of larger ones such as tars."""

import os
from collections import OrderedDict

from data_pipelines.checked_files import read_bounded, regular_descriptor

# In place of the bytes of a member, which a listing does not know.
WHOLE = -1


def member_path(path: str, member: str) -> str:
    """Where a reader finds what belongs to the image at `path`: b/a.png has b/a.map.png."""
    return f"{os.path.splitext(path)[0]}.{member}"  # noqa: PTH122 (fast)


class FileReader:
    """Whole files."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        if length == WHOLE:
            return read_bounded(path) if os.path.exists(path) else b""  # noqa: PTH110 (fast)
        descriptor = regular_descriptor(path)
        try:
            # One byte more than planned shows a file that has grown.
            data = os.read(descriptor, length + 1)
        finally:
            os.close(descriptor)
        return _checked(data, path, 0, length)


class RangeReader:
    """Ranges of files; keeps at most `max_open` of them open."""

    def __init__(self, max_open: int = 64) -> None:
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._open:
            if len(self._open) == self._max_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = regular_descriptor(path)
        self._open.move_to_end(path)
        return _checked(os.pread(self._open[path], length, offset), path, offset, length)


def _checked(data: bytes, path: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        raise ValueError(
            f"{path}: expected {length:,} bytes at offset {offset:,}, got {len(data):,}: the source has changed since"
            " the plan was made; delete the unfinished target and start again"
        )
    return data
