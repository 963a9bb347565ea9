"""The index of a shard set: where each sample's image lies, its label and its checksum, as numpy arrays.

    open_shards(folder): manifest.json -> index.npz -> sizes of the tars -> ShardSet

Opening proves that manifest, index and the tars' sizes belong together; it reads no tar.
`data_pipelines.upkeep.verify` reads everything.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.checked_files import read_bounded
from data_pipelines.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    max_index_bytes,
    read_manifest,
)
from data_pipelines.shards.npz_columns import Columns, parse_columns, render_columns
from data_pipelines.shards.packed_strings import PackedStrings
from data_pipelines.text.pieces import KIND, PAIR_KINDS

# Column -> little-endian type. One value per sample, except for `key_bytes`.
COLUMNS = {
    "shard_of": "<i4",
    "offset": "<i8",
    "length": "<i8",
    "label": "<i4",
    "crc": "<u4",
    "width": "<i4",
    "height": "<i4",
    "record_offset": "<i8",
    "frame_crc": "<u4",
    "key_end": "<i8",
    "key_bytes": "|u1",
}

# What a set with other members has of each of them, as `offset.map.png`; length 0 is none.
_OF_MEMBERS = ("offset", "length", "crc")

# Where an unfinished writer keeps its plan; the manifest appears only when all is done.
WORK_FOLDER = ".writing"


class MemberColumns(NamedTuple):
    """One member of every sample: its bytes in the tar, as the set's own columns say where the image's are."""

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc: NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """An opened shard set of N samples. Arrays are read-only.

    `offset` and `length` (bytes) locate the image inside its tar, `crc` is zlib.crc32 of its bytes, `width` and
    `height` are pixels. A record is a whole sample in the tar, headers and padding included: it starts at
    `record_offset` and ends where the next one starts; `frame_crc` is the checksum of all of it but the image.
    `members` are what samples have beside that, by ending: `map.png`.
    """

    folder: Path
    manifest: Manifest = field(repr=False)
    shard_of: NDArray[np.int32] = field(repr=False)
    offset: NDArray[np.int64] = field(repr=False)
    length: NDArray[np.int64] = field(repr=False)
    label: NDArray[np.int32] = field(repr=False)
    crc: NDArray[np.uint32] = field(repr=False)
    width: NDArray[np.int32] = field(repr=False)
    height: NDArray[np.int32] = field(repr=False)
    record_offset: NDArray[np.int64] = field(repr=False)
    frame_crc: NDArray[np.uint32] = field(repr=False)
    keys: PackedStrings = field(repr=False)
    members: Mapping[str, MemberColumns] = field(repr=False, default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.offset)

    @property
    def is_text(self) -> bool:
        """Whether samples are windows of text: `width` is then their bytes, and `height` those that count."""
        return self.manifest.writer.get("kind") == KIND or self.is_pairs

    @property
    def is_pairs(self) -> bool:
        """Whether they are pairs of texts: `width` is then the bytes of the source, and `height` of the target."""
        return self.manifest.writer.get("kind") in PAIR_KINDS

    @property
    def class_names(self) -> list[str]:
        return self.manifest.class_names

    @property
    def num_classes(self) -> int:
        return len(self.manifest.class_names)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that identifies the content: shards in order, labels and class names."""
        return self.manifest.fingerprint

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    @cached_property
    def shard_names(self) -> list[str]:
        return [shard.file for shard in self.manifest.shards]

    def key(self, index: int) -> str:
        """The sample's name in the tar, without the endings `.jpg`, `.cls`, `.json`."""
        return self.keys[index]


def open_shards(folder: str | Path, *, check_tars: bool = True, allow_remote: bool = False) -> ShardSet:
    """The shard set in `folder`; `check_tars` False leaves the tars' presence and sizes unchecked.

    Tars on a server are refused unless `allow_remote`, for those who need the index alone; `open_data` reads them.

    Raises FileNotFoundError or ValueError, with what to do, when a part is missing, cut off, or of other shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such shard folder; make it with `sret-scale shards write`")
    if not (folder / MANIFEST_NAME).exists():
        raise FileNotFoundError(_why_no_manifest(folder))
    manifest = read_manifest(folder)
    path = folder / INDEX_NAME
    try:
        index = read_bounded(path, max_index_bytes(manifest.num_samples))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; copy it again, or write the shards again") from None
    # Tars that someone else wrote may lie elsewhere.
    location = str(manifest.writer.get("location", folder))
    is_remote = "://" in location
    if is_remote and not allow_remote:
        raise ValueError(
            f"{folder}: its tars lie in {location}, expected tars in a folder: copy them, and index the copy with"
            " `sret-scale shards index`; train and evaluate read them where they are (in Python: open_data)"
        )
    shards = parse_set(folder if is_remote else Path(location), manifest, index, path)
    if check_tars and not is_remote:
        _check_sizes(shards.folder, manifest.shards)
    return shards


def parse_set(folder: Path, manifest: Manifest, index: bytes, source: str | Path) -> ShardSet:
    """The set that `manifest` and the bytes of its index make; `source` names the index in a ValueError."""
    columns = _parse_index(index, manifest, source)
    _check_columns(columns, manifest, source)
    keys = PackedStrings(columns["key_end"], columns["key_bytes"])
    arrays = {name: columns[name] for name in COLUMNS if not name.startswith("key_")}
    members = {name: MemberColumns(*(columns[f"{of}.{name}"] for of in _OF_MEMBERS)) for name in manifest.members}
    return ShardSet(folder=folder, manifest=manifest, keys=keys, members=members, **arrays)


def column_types(members: Iterable[str]) -> dict[str, str]:
    """Column -> type of an index of samples that have these members."""
    return COLUMNS | {f"{of}.{name}": COLUMNS[of] for name in members for of in _OF_MEMBERS}


def render_index(columns: Columns, members: Iterable[str] = ()) -> bytes:
    """The bytes of index.npz: an uncompressed .npz, the same for the same columns."""
    types = column_types(members)
    assert set(columns) == set(types), set(columns) ^ set(types)
    return render_columns({name: columns[name].astype(kind, copy=False) for name, kind in types.items()})


def _why_no_manifest(folder: Path) -> str:
    if (folder / WORK_FOLDER).exists():
        return f"{folder}: an unfinished shard set; run its `sret-scale shards write` command again to finish it"
    if any(folder.glob("*.tar")):
        return f"{folder}: tars without {MANIFEST_NAME}; make it with `sret-scale shards index {folder}`"
    return f"{folder}: no {MANIFEST_NAME}, so not a shard set; make one with `sret-scale shards write`"


def _parse_index(data: bytes, manifest: Manifest, source: str | Path) -> dict[str, NDArray[Any]]:
    if len(data) != manifest.index_bytes or hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise ValueError(
            f"{source}: changed, cut off or of other shards: {len(data):,} bytes; {MANIFEST_NAME} expects"
            f" {manifest.index_bytes:,} with sha256 {manifest.index_sha256[:12]}...; copy or write the shards again"
        )
    try:
        columns = parse_columns(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; write the shards again") from error
    for name, kind in column_types(manifest.members).items():
        if name not in columns or columns[name].dtype != np.dtype(kind) or columns[name].ndim != 1:
            raise ValueError(f"{source}: expected a column {name} of type {kind}; write the shards again")
    return columns


def _check_columns(columns: Columns, manifest: Manifest, source: str | Path) -> None:
    """Raises ValueError unless every sample lies inside its record and its shard and has a label among the classes."""
    lengths = {name: len(columns[name]) for name in column_types(manifest.members) if name != "key_bytes"}
    if set(lengths.values()) != {manifest.num_samples}:
        raise ValueError(
            f"{source}: columns of {sorted(set(lengths.values()))} rows, expected {manifest.num_samples} in each;"
            " write the shards again"
        )
    label, num_classes = columns["label"], len(manifest.class_names)
    outside = np.flatnonzero((label < 0) | (label >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{source}: label {int(label[first])} of sample {first} is outside the {num_classes} classes; "
            "write the shards again"
        )
    counts = [shard.num_samples for shard in manifest.shards]
    shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    # Where records end: where the next one of the shard begins, or the shard ends.
    start, key_end = columns["record_offset"], columns["key_end"]
    end = np.repeat(np.array([shard.end for shard in manifest.shards], np.int64), counts)
    is_inner = np.diff(shard_of) == 0
    end[:-1][is_inner] = start[1:][is_inner]
    names = ["", *(f".{name}" for name in manifest.members)]
    places = [(columns[f"offset{name}"], columns[f"length{name}"]) for name in names]
    # In this order, so that no sum of what the file says runs over.
    sound = (
        np.array_equal(columns["shard_of"], shard_of)
        and bool((start >= 0).all() and (start < end).all())
        and all(
            bool((offset <= end).all() and (offset - start >= 512).all())
            and bool((length >= 0).all() and (length <= end - offset).all())
            for offset, length in places
        )
        and bool((key_end >= 0).all() and (np.diff(key_end) >= 0).all())
        and (int(key_end[-1]) if len(key_end) else 0) == len(columns["key_bytes"])
    )
    if not sound:
        raise ValueError(f"{source}: rows that lie outside their shard or the keys; write the shards again")


def _check_sizes(folder: Path, shards: list[ShardEntry]) -> None:
    for shard in shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: this shard is missing; copy it again, or write the shards again"
            ) from None
        if size != shard.bytes:
            what = "cut off" if size < shard.bytes else "longer than it was written"
            raise ValueError(
                f"{path}: {what}, {size:,} bytes, expected {shard.bytes:,}; copy it again or write it again"
            )
