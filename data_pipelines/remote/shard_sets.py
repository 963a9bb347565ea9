"""Shard sets by their location: a local folder, or a URL whose shards stream through a cache on the node.

A set at https://host/set:
    manifest.json, index.npz     fetched and checked when it is opened
    shard-000000.tar, ...        fetched whole, in order of use and ahead of it (`Prefetcher`), or, for small sets,
                                 read by a range of bytes for each sample
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import MAX_JSON_BYTES, read_bounded
from data_pipelines.config import DataConfig
from data_pipelines.extras import install_extra
from data_pipelines.home_folder import with_home
from data_pipelines.remote.cache import ShardCache
from data_pipelines.shards.index import ShardSet, open_shards, parse_set
from data_pipelines.shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, max_index_bytes, parse_manifest
from data_pipelines.shards.mixture import MixedShardSet, mix_shards

if TYPE_CHECKING:
    from data_pipelines.remote.fetch import RemoteFolder


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoteShardSet(ShardSet):
    """A shard set whose tars are leased from `cache`, or read by ranges of bytes where that is None.

    `folder` holds manifest and index, and those shards that the cache has.
    """

    url: str
    cache: ShardCache | None
    read_range: Callable[[str, int, int], bytes]


def open_data(location: str | Path, config: DataConfig) -> ShardSet:
    """The shard set at a folder or a URL. Raises ValueError or OSError with what to do."""
    location = str(location)
    if ":" not in location.partition("/")[0]:
        shards = open_shards(location, allow_remote=True)
        # Indexed here by `shards index`, with tars on a server.
        url = str(shards.manifest.writer.get("location", ""))
        if "://" not in url:
            return shards
        data = read_bounded(Path(location) / MANIFEST_NAME, MAX_JSON_BYTES)
        return _streamed(shards, _own_folder(_folders(data, config)), remote_folder(url, config), config)
    remote = remote_folder(location, config)
    data = remote.read_whole(MANIFEST_NAME, MAX_JSON_BYTES)
    manifest = parse_manifest(data, f"{remote.url}/{MANIFEST_NAME}")
    folders = _folders(data, config)
    kept = _kept_index(folders, manifest)
    index = remote.read_whole(INDEX_NAME, manifest.index_bytes) if kept is None else kept
    # Before anything of it is kept: what a server says names files in the cache.
    shards = parse_set(folders[0], manifest, index, f"{remote.url}/{INDEX_NAME}")
    folder = _own_folder(folders)
    if kept is None:
        for name, content in ((INDEX_NAME, index), (MANIFEST_NAME, data)):
            write_whole(folder / name, content)
    return _streamed(shards, folder, remote, config)


def remote_folder(url: str, config: DataConfig) -> "RemoteFolder":
    """The files at a URL; ValueError where it is none, or where a package is missing."""
    try:
        from data_pipelines.remote.fetch import RemoteFolder
    except ModuleNotFoundError as error:
        raise ValueError(f"{url}: needs {error.name}; {install_extra('remote')}") from error
    return RemoteFolder(url, stall_s=config.stall_s, attempts=config.fetch_attempts)


def _folders(manifest: bytes, config: DataConfig) -> list[Path]:
    """Where its shards may be kept: jobs that read the same ones from anywhere share it, others cannot meet in it."""
    name = hashlib.sha256(manifest).hexdigest()[:16]
    return [_cache_root(config) / name, _cache_root(config) / f"{name}-{os.geteuid()}"]


def _streamed(shards: ShardSet, folder: Path, remote: "RemoteFolder", config: DataConfig) -> RemoteShardSet:
    """The set with its tars on a server, kept in `folder` or read by ranges."""
    cache = None
    if config.remote_reads == "shards":
        cache = ShardCache(remote.download, folder, shards.manifest, max_bytes=int(config.cache_gib * 2**30))
    known = {field.name: getattr(shards, field.name) for field in fields(ShardSet)} | {"folder": folder}
    return RemoteShardSet(**known, url=remote.url, cache=cache, read_range=remote.read)


def open_training_data(config: DataConfig) -> ShardSet:
    """The training set: one location, or the mixture of several, local or not."""
    locations = (config.train_folder, *config.mixture_folders)
    parts = [open_data(location, config) for location in locations]
    return parts[0] if len(parts) == 1 else mix_shards(parts)


def part_of(shards: ShardSet, shard: int) -> tuple[ShardSet, int]:
    """The set of a mixture that `shard` belongs to, and its number there; of any other set, the set itself."""
    if isinstance(shards, MixedShardSet):
        for part in shards.parts:
            if shard < part.num_shards:
                return part, shard
            shard -= part.num_shards
    return shards, shard


def address_of(shards: ShardSet, shard: int) -> str:
    """The path of a shard, or its URL where it streams."""
    part, number = part_of(shards, shard)
    location = part.url if isinstance(part, RemoteShardSet) else part.folder
    return f"{location}/{part.shard_names[number]}"


def cache_of(shards: ShardSet) -> ShardCache | None:
    """Where the tars of a set are leased; None for a local set, or one that is read by ranges."""
    return shards.cache if isinstance(shards, RemoteShardSet) else None


def bytes_by_cache(shards: ShardSet, wanted: Iterable[int]) -> dict[ShardCache, int]:
    """The bytes of the `wanted` shards in each cache that holds some of them."""
    num_bytes: dict[ShardCache, int] = {}
    for shard in wanted:
        part, number = part_of(shards, shard)
        cache = cache_of(part)
        if cache is not None:
            num_bytes[cache] = num_bytes.get(cache, 0) + part.manifest.shards[number].bytes
    return num_bytes


class Prefetcher:
    """Fetches shards in threads, in the order asked for. Leaving the `with` cancels what has not begun.

    What fails here fails again where the shard is read, and is handled there.
    """

    def __init__(self, shards: ShardSet, *, num_threads: int) -> None:
        self._shards = shards
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._running: dict[int, Future[None]] = {}

    def want(self, shards: Iterable[int]) -> None:
        """Begins to fetch those that are not here and not under way."""
        self._running = {shard: future for shard, future in self._running.items() if not future.done()}
        for shard in shards:
            part, number = part_of(self._shards, shard)
            cache = cache_of(part)
            if cache is not None and shard not in self._running and not cache.has(number):
                self._running[shard] = self._executor.submit(self._fetch, cache, number)

    @staticmethod
    def _fetch(cache: ShardCache, number: int) -> None:
        with cache.lease(number):
            pass

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _cache_root(config: DataConfig) -> Path:
    if config.cache_folder:
        return Path(config.cache_folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or with_home("~/.cache")) / "sret_scale" / "shards"


def _own_folder(folders: Sequence[Path]) -> Path:
    """The first that belongs to this user: that of another one may change under us, or be written by him.

    Users of one cache have a folder each. Owners are compared with that of a new file of ours: some file systems show
    another one than the user. Raises OSError where there is no room of our own.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if os.fstat(file.fileno()).st_uid == folder.lstat().st_uid:
                    return folder
        except PermissionError:
            continue
    raise PermissionError(
        f"{folders[0].parent}: neither is this cache yours, nor may you write to it; chmod 1777 it, or set"
        " data.cache_folder"
    )


def _kept_index(folders: Iterable[Path], manifest: Manifest) -> bytes | None:
    """The index that one of these has already, if it is whole: its hash tells, whoever wrote it."""
    for folder in folders:
        with contextlib.suppress(PermissionError, ValueError):
            if (folder / INDEX_NAME).is_file():
                data = read_bounded(folder / INDEX_NAME, max_index_bytes(manifest.num_samples))
                if hashlib.sha256(data).hexdigest() == manifest.index_sha256:
                    return data
    return None
