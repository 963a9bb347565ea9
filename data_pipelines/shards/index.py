"""The index of a shard set: where each sample's image lies, its label and its checksum, as numpy arrays.

    open_shards(folder): manifest.json -> index.npz -> sizes of the tars -> ShardSet

Opening proves that manifest, index and the tars' sizes belong together; it reads no tar.
`data_pipelines.upkeep.verify` reads everything.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from data_pipelines.shards.npz_columns import Columns, parse_columns, render_columns
from data_pipelines.shards.packed_strings import PackedStrings

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

# Where an unfinished writer keeps its plan; the manifest appears only when all is done.
WORK_FOLDER = ".writing"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """An opened shard set of N samples. Arrays are read-only.

    `offset` and `length` (bytes) locate the image inside its tar, `crc` is zlib.crc32 of its bytes, `width` and
    `height` are pixels. A record is a whole sample in the tar, headers and padding included: it starts at
    `record_offset` and ends where the next one starts; `frame_crc` is the checksum of all of it but the image.
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

    @property
    def num_samples(self) -> int:
        return len(self.offset)

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


def open_shards(folder: str | Path, *, check_tars: bool = True) -> ShardSet:
    """The shard set in `folder`; `check_tars` False leaves the tars' presence and sizes unchecked.

    Raises FileNotFoundError or ValueError, with what to do, when a part is missing, cut off, or of other shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such shard folder; make it with `sret-scale shards write`")
    if not (folder / MANIFEST_NAME).exists():
        raise FileNotFoundError(_why_no_manifest(folder))
    manifest = read_manifest(folder)
    columns = _read_index(folder / INDEX_NAME, manifest)
    _check_columns(columns, manifest.shards, len(manifest.class_names), folder / INDEX_NAME)
    if check_tars:
        _check_sizes(folder, manifest.shards)
    keys = PackedStrings(columns["key_end"], columns["key_bytes"])
    arrays = {name: columns[name] for name in COLUMNS if not name.startswith("key_")}
    return ShardSet(folder=folder, manifest=manifest, keys=keys, **arrays)


def render_index(columns: Columns) -> bytes:
    """The bytes of index.npz: an uncompressed .npz, the same for the same columns."""
    assert set(columns) == set(COLUMNS), set(columns) ^ set(COLUMNS)
    return render_columns({name: columns[name].astype(kind, copy=False) for name, kind in COLUMNS.items()})


def _why_no_manifest(folder: Path) -> str:
    if (folder / WORK_FOLDER).exists():
        return f"{folder}: an unfinished shard set; run its `sret-scale shards write` command again to finish it"
    if any(folder.glob("*.tar")):
        return f"{folder}: tars without {MANIFEST_NAME}; make it with `sret-scale shards index {folder}`"
    return f"{folder}: no {MANIFEST_NAME}, so not a shard set; make one with `sret-scale shards write`"


def _read_index(path: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; copy it again, or write the shards again") from None
    if len(data) != manifest.index_bytes or hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise ValueError(
            f"{path}: changed, cut off or of other shards: {len(data):,} bytes; {MANIFEST_NAME} expects"
            f" {manifest.index_bytes:,} with sha256 {manifest.index_sha256[:12]}...; copy or write the shards again"
        )
    try:
        columns = parse_columns(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write the shards again") from error
    for name, kind in COLUMNS.items():
        if name not in columns or columns[name].dtype != np.dtype(kind) or columns[name].ndim != 1:
            raise ValueError(f"{path}: expected a column {name} of type {kind}; write the shards again")
    return columns


def _check_columns(columns: Columns, shards: list[ShardEntry], num_classes: int, path: Path) -> None:
    """Raises ValueError unless every sample lies inside its shard and has a label among the classes."""
    counts = np.array([shard.num_samples for shard in shards], np.int64)
    num_samples = int(counts.sum())
    lengths = {name: len(columns[name]) for name in COLUMNS if name != "key_bytes"}
    if set(lengths.values()) != {num_samples}:
        raise ValueError(f"{path}: columns of {sorted(set(lengths.values()))} rows, expected {num_samples} in each")
    shard_ends = np.repeat(np.array([shard.end for shard in shards], np.int64), counts)
    label = columns["label"]
    key_end = columns["key_end"]
    outside = np.flatnonzero((label < 0) | (label >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{path}: label {int(label[first])} of sample {first} is outside the {num_classes} classes; "
            "write the shards again"
        )
    sound = (
        np.array_equal(columns["shard_of"], np.repeat(np.arange(len(shards), dtype=np.int32), counts))
        and bool((columns["record_offset"] >= 0).all())
        and bool((columns["offset"] >= columns["record_offset"] + 512).all())
        and bool((columns["length"] >= 0).all())
        and bool((columns["offset"] + columns["length"] <= shard_ends).all())
        and bool((np.diff(key_end, prepend=0) >= 0).all())
        and (int(key_end[-1]) if num_samples else 0) == len(columns["key_bytes"])
    )
    if not sound:
        raise ValueError(f"{path}: rows that lie outside their shard or the keys; write the shards again")


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
