"""Bytes of one sample: index lookup, one `os.pread`, a CRC check. Safe to share between threads.

Plain files at random offsets read faster than a tar stream, and need no state: the index says where a sample is.
"""

import os
import threading
import zlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.remote.cache import UnavailableError
from data_pipelines.remote.shard_sets import RemoteShardSet, address_of, part_of
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.stalls import InProgress

# What stands where a shard should be and is a pipe fails when it is read, and is not waited for.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def sample_name(shards: ShardSet, index: int) -> str:
    """Where a sample is, for messages: shard, key and offset."""
    path = Path(shards.folder) / shards.shard_names[int(shards.shard_of[index])]
    return f"{path}: sample {shards.key(index)!r} at offset {int(shards.offset[index])}"


class BadSampleError(ValueError):
    """A sample that cannot be read or decoded: names shard, key, offset and reason."""

    def __init__(self, shards: ShardSet, index: int, reason: str) -> None:
        self.shard = shards.shard_names[int(shards.shard_of[index])]
        self.key = shards.key(index)
        self.offset = int(shards.offset[index])
        self.index = index
        self.reason = reason
        super().__init__(f"{sample_name(shards, index)}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it can come from a worker process."""
        return _restored, (self.__dict__, str(self))


def _restored(fields: dict[str, Any], message: str) -> BadSampleError:
    error = BadSampleError.__new__(BadSampleError)
    error.args = (message,)
    error.__dict__.update(fields)
    return error


class ShardReader:
    """Reads samples of a shard set, local or remote; close it, or use it in a `with`.

    Keeps at most `max_open_shards` files of a local set open.
    """

    def __init__(self, shards: ShardSet, *, max_open_shards: int = 128) -> None:
        self._shards = shards
        self._max_open_shards = max_open_shards
        self._lock = threading.Lock()
        # What threads read now.
        self.in_progress = InProgress(partial(address_of, shards))
        # shard -> [file descriptor, reads in progress], the least recently used first
        self._open: OrderedDict[int, list[int]] = OrderedDict()

    def read(self, index: int, member: str = "") -> bytes:
        """The bytes of the image of sample `index`, or of another of the set's members.

        Raises BadSampleError when they are not those that were indexed.
        """
        shards, what = self._shards, f"{member}: " if member else ""
        place = shards.members[member] if member else shards
        length, shard = int(place.length[index]), int(shards.shard_of[index])
        number = self.in_progress.begin(shard)
        try:
            data = self._read_somewhere(shard, length, int(place.offset[index]))
        except UnavailableError:
            # A server that does not answer is no fault of the sample.
            raise
        except OSError as error:
            raise BadSampleError(shards, index, f"{what}cannot read the shard: {error.strerror or error}") from error
        finally:
            self.in_progress.end(number)
        if len(data) != length:
            raise BadSampleError(shards, index, f"{what}the shard ends after {len(data)} of {length} bytes")
        crc = zlib.crc32(data)
        expected = int(place.crc[index])
        if crc != expected:
            reason = f"{what}checksum {crc:08x}, expected {expected:08x}: the bytes have changed"
            raise BadSampleError(shards, index, reason)
        return data

    def close(self) -> None:
        """Closes all files. No read may be in progress."""
        with self._lock:
            for descriptor, num_reads in self._open.values():
                assert num_reads == 0, "a reader is closed while a thread reads"
                os.close(descriptor)
            self._open.clear()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_somewhere(self, shard: int, length: int, offset: int) -> bytes:
        part, number = part_of(self._shards, shard)
        if not isinstance(part, RemoteShardSet):
            return self._read_file(shard, length, offset)
        if part.cache is None:
            return part.read_range(part.shard_names[number], offset, offset + length)
        # Opened for one read: an open file would take up room after it was evicted.
        with part.cache.lease(number) as path:
            descriptor = os.open(path, _READ)
            try:
                return _read_exactly(descriptor, length, offset)
            finally:
                os.close(descriptor)

    def _read_file(self, shard: int, length: int, offset: int) -> bytes:
        """Reads from a file of a local set, which stays open."""
        with self._lock:
            entry = self._open.get(shard)
            if entry is None:
                path = Path(self._shards.folder) / self._shards.shard_names[shard]
                entry = self._open[shard] = [os.open(path, _READ), 0]
                self._close_unused()
            self._open.move_to_end(shard)
            entry[1] += 1
        try:
            return _read_exactly(entry[0], length, offset)
        finally:
            with self._lock:
                entry[1] -= 1

    def _close_unused(self) -> None:
        """Closes the least recently used files that no thread reads, until the limit holds."""
        surplus = len(self._open) - self._max_open_shards
        for shard in [shard for shard, entry in self._open.items() if entry[1] == 0][: max(surplus, 0)]:
            os.close(self._open.pop(shard)[0])


def _read_exactly(descriptor: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`; fewer only where the file ends."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
