"""Writes one shard of a plan: the tar, then its done-marker, which holds its rows of the index.

    read image -> check -> record -> .writing/shard-000000.tar.*.tmp -> fsync -> rename -> .writing/done-000000.npz

The same plan gives the same bytes, so that it does not matter who writes a shard, or how often.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipelines.columns import parse_columns, render_columns
from data_pipelines.files import replacing
from data_pipelines.index import COLUMNS, WORK_FOLDER
from data_pipelines.manifest import ShardEntry
from data_pipelines.sources.listing import Reader
from data_pipelines.strings import pack_strings
from data_pipelines.tar.records import END_OF_ARCHIVE, Record, make_record
from data_pipelines.writing.image_header import BadImageError, ImageHeader
from data_pipelines.writing.plan import Plan
from data_pipelines.writing.prepare import ImageOptions, prepare_image

QUARANTINE_FOLDER = "quarantine"


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An image that was left out, and why."""

    key: str
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DoneShard:
    """A written shard: its entry in the manifest, its rows of the index, what was left out."""

    entry: ShardEntry
    columns: dict[str, NDArray[Any]]
    rejected: list[Rejected]


def shard_file(index: int) -> str:
    """Name of the shard's tar."""
    return f"shard-{index:06d}.tar"


def done_path(folder: Path, index: int) -> Path:
    """The marker that says that a shard is complete."""
    return folder / WORK_FOLDER / f"done-{index:06d}.npz"


def write_shard(plan: Plan, index: int, folder: Path, *, options: ImageOptions, reader: Reader) -> DoneShard:
    """Writes shard `index` of the plan into `folder`, then its done-marker, which is returned.

    Raises ValueError for a bad image under the policy "fail", OSError when the disk is full or a source unreadable.
    """
    path = folder / shard_file(index)
    builder = _Builder(num_classes=len(plan.listing.class_names))
    with replacing(path, folder / WORK_FOLDER) as file:
        for row in range(int(plan.starts[index]), int(plan.starts[index + 1])):
            image = _read_image(plan, row, reader)
            try:
                stored, header = prepare_image(image, options)
            except BadImageError as error:
                _reject(plan, row, image=image, reason=str(error), options=options, folder=folder)
                builder.rejected.append(_rejected(plan, row, str(error)))
            else:
                builder.add(file, plan, row, image=stored, header=header, with_metadata=options.metadata)
        builder.finish(file)
    done = builder.done(shard_file(index))
    save_done(folder, index, done)
    return done


def save_done(folder: Path, index: int, done: DoneShard) -> None:
    """Writes the done-marker of a shard."""
    head = {"entry": asdict(done.entry), "rejected": [asdict(item) for item in done.rejected]}
    columns = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), **done.columns}
    with replacing(done_path(folder, index)) as file:
        file.write(render_columns(columns))


def load_done(folder: Path, index: int) -> DoneShard:
    """The done-marker of a shard."""
    columns = parse_columns(done_path(folder, index).read_bytes())
    head = json.loads(columns.pop("head").tobytes())
    rejected = [Rejected(**item) for item in head["rejected"]]
    return DoneShard(entry=ShardEntry(**head["entry"]), columns=columns, rejected=rejected)


def is_done(folder: Path, index: int) -> bool:
    """Whether the shard was completed: its marker appears after its tar was flushed and renamed."""
    return done_path(folder, index).exists() and (folder / shard_file(index)).exists()


def _read_image(plan: Plan, row: int, reader: Reader) -> bytes:
    listing = plan.listing
    path = listing.paths[int(listing.path_of[row])]
    return reader.read(path, int(listing.offset[row]), int(listing.length[row]))


def _rejected(plan: Plan, row: int, reason: str) -> Rejected:
    return Rejected(key=plan.listing.keys[row], name=plan.listing.names[row], reason=reason)


def _reject(plan: Plan, row: int, *, image: bytes, reason: str, options: ImageOptions, folder: Path) -> None:
    """Does what the policy says with a bad image."""
    listing = plan.listing
    if options.on_bad == "fail":
        raise ValueError(
            f"{listing.names[row]!r}: {reason}; remove it from the source, or leave such images out with"
            " --on-bad skip or --on-bad quarantine"
        )
    if options.on_bad == "quarantine":
        # Keys have slashes; one flat folder is easier to look through.
        target = folder / QUARANTINE_FOLDER / listing.keys[row].replace("/", "%2F")
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as file:
            file.write(image)


class _Builder:
    """Collects the rows, the counts and the hash of a shard while its records are written."""

    def __init__(self, *, num_classes: int) -> None:
        self.rejected: list[Rejected] = []
        self._rows: dict[str, list[int]] = {name: [] for name in COLUMNS if not name.startswith("key_")}
        self._keys: list[str] = []
        self._num_classes = num_classes
        self._digest = hashlib.sha256()
        self._position = 0

    def add(
        self, file: BinaryIO, plan: Plan, row: int, *, image: bytes, header: ImageHeader, with_metadata: bool
    ) -> None:
        listing = plan.listing
        key, label = listing.keys[row], int(listing.label[row])
        metadata = {"class": listing.class_names[label], "source": listing.names[row]} if with_metadata else None
        record = make_record(key, header.extension, image, label, metadata)
        self._keys.append(key)
        values = {
            "shard_of": 0,
            "offset": self._position + record.image_start,
            "length": len(image),
            "label": label,
            "crc": record.image_crc,
            "width": header.width,
            "height": header.height,
            "record_offset": self._position,
            "record_crc": zlib.crc32(record.data),
        }
        for name, value in values.items():
            self._rows[name].append(value)
        self._put(file, record)

    def _put(self, file: BinaryIO, record: Record) -> None:
        file.write(record.data)
        self._digest.update(record.data)
        self._position += len(record.data)

    def finish(self, file: BinaryIO) -> None:
        file.write(END_OF_ARCHIVE)
        self._digest.update(END_OF_ARCHIVE)

    def done(self, name: str) -> DoneShard:
        keys = pack_strings(self._keys)
        columns: dict[str, NDArray[Any]] = {"key_end": keys.ends, "key_bytes": keys.blob}
        for column, values in self._rows.items():
            columns[column] = np.array(values, COLUMNS[column])
        entry = ShardEntry(
            file=name,
            bytes=self._position + len(END_OF_ARCHIVE),
            sha256=self._digest.hexdigest(),
            end=self._position,
            num_samples=len(self._keys),
            class_counts=np.bincount(columns["label"], minlength=self._num_classes).tolist(),
        )
        return DoneShard(entry=entry, columns=columns, rejected=self.rejected)
