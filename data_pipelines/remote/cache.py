"""Whole shards on the disk of a node, shared by its ranks and other jobs: fetched when needed, evicted when too many.

    lease(shard): file there?  --yes--> use it, pinned by a shared lock
                  --no-->  make room, fetch to NAME.part, check size and hash, fsync, rename, use it

Locks are the kernel's (flock), one a shard and one for making room, so a killed job leaves none behind. What a
killed job was writing is found under the shard's lock and written anew. A file is complete or absent under its
name.
"""

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from data_pipelines.atomic_files import lock_file, sync_path
from data_pipelines.shards.manifest import Manifest

# How long a fetch waits for room that others use.
_ROOM_TIMEOUT_S = 60.0
# For so long a shard that was not that of the manifest is not fetched again: a proxy's error page may pass.
_CHANGED_S = 300.0


class UnavailableError(OSError):
    """A server that did not answer in any of the attempts, or no room for the file; no fault of the file."""


class ChangedFileError(OSError):
    """A file that is not the one that the manifest names."""


class Download(Protocol):
    """Writes a remote file to `target`, which exists with `num_bytes`; raises OSError unless all of it arrived."""

    def __call__(self, name: str, target: Path, *, num_bytes: int, file_hash: str) -> None: ...


class ShardCache:
    """The shards of one set in `folder`, at most `max_bytes` of them. Safe for threads and processes."""

    def __init__(self, download: Download, folder: Path, manifest: Manifest, *, max_bytes: int) -> None:
        self._download, self._folder, self.max_bytes = download, folder, max_bytes
        self._shards = manifest.shards
        # Shards that have changed on the server, what was said and when: each of their samples would fetch them anew.
        self._changed: dict[int, tuple[str, float]] = {}
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        if largest > max_bytes:
            raise ValueError(f"{folder}: a cache of {max_bytes:,} bytes cannot hold a shard of {largest:,}")

    def has(self, shard: int) -> bool:
        """Whether the shard is here now."""
        return (self._folder / self._shards[shard].file).exists()

    @contextmanager
    def lease(self, shard: int) -> Iterator[Path]:
        """The path of the shard's file, which stays until the `with` is left.

        Raises ChangedFileError for a shard that is not that of the manifest; it is fetched again after minutes.
        """
        path = self._folder / self._shards[shard].file
        with _locked(_lock_of(path), fcntl.LOCK_SH) as lock:
            if not path.exists():
                # Between giving up the shared lock and having the other one, another process may have fetched it.
                lock_file(lock, fcntl.LOCK_EX, path)
                said, said_s = self._changed.get(shard, ("", -math.inf))
                if not path.exists() and time.monotonic() - said_s < _CHANGED_S:
                    raise ChangedFileError(said)
                if not path.exists():
                    self._fetch(shard, path)
                lock_file(lock, fcntl.LOCK_SH, path)
            # The time of last use, for eviction: reading does not set it on file systems mounted with noatime.
            os.utime(path)
            yield path

    def _fetch(self, shard: int, path: Path) -> None:
        entry = self._shards[shard]
        part = path.with_name(path.name + ".part")
        deadline = time.monotonic() + _ROOM_TIMEOUT_S
        while not self._reserve(part, entry.bytes):
            # Others use their shards for the time of one read, or of one download.
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{self._folder}: the cache's {self.max_bytes:,} bytes are in use, and {entry.bytes:,} more are "
                    "needed: raise data.cache_gib"
                )
            time.sleep(0.02)
        try:
            self._download(entry.file, part, num_bytes=entry.bytes, file_hash=entry.hash)
            with self._room():
                part.rename(path)
        except BaseException as error:
            with self._room():
                part.unlink(missing_ok=True)
            if isinstance(error, ChangedFileError):
                self._changed[shard] = (str(error), time.monotonic())
            raise
        sync_path(self._folder)

    def _room(self) -> AbstractContextManager[int]:
        """Held by whoever adds, renames or removes files, so that what is counted is what is there."""
        return _locked(self._folder / "room.lock", fcntl.LOCK_EX)

    def _reserve(self, part: Path, num_bytes: int) -> bool:
        """Makes `part` a file of `num_bytes`, after evicting what is needed for it. False when there is no room now."""
        with self._room():
            # What a killed job was writing.
            part.unlink(missing_ok=True)
            if self._evict(self.max_bytes - num_bytes) + num_bytes > self.max_bytes:
                return False
            with part.open("xb") as file:
                try:
                    # Fails now rather than in the middle when the disk is full.
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                except OSError as error:
                    part.unlink()
                    raise UnavailableError(f"{part}: {error.strerror} ({num_bytes:,} bytes are needed)") from error
            return True

    def _evict(self, limit: int) -> int:
        """Removes files that nobody uses, the longest unused first, until `limit` bytes are left; what is left."""
        files = [path for path in self._folder.iterdir() if path.suffix in (".tar", ".part")]
        facts = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in files)
        used = sum(size for _, size, _ in facts)
        for _, size, path in facts:
            if used <= limit:
                break
            if _remove_if_unused(path):
                used -= size
        return used


def _remove_if_unused(path: Path) -> bool:
    # A part is guarded by the lock of its shard: one that can be locked was left by a killed job.
    lock = _lock_of(path.with_suffix("") if path.suffix == ".part" else path)
    try:
        with _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[int]:
    """A file descriptor that holds a lock of the file, as long as the `with` lasts."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        lock_file(descriptor, operation, path)
        yield descriptor
    finally:
        os.close(descriptor)
