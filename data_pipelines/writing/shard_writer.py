"""Writes one shard of a plan: the tar, then its done-marker, which holds its rows of the index.

    read image -> prepare -> record -> .writing/shard-000000.tar.*.tmp -> fsync -> rename -> .writing/done-000000.npz

The same plan gives the same bytes, so that it does not matter who writes a shard, or how often.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from data_pipelines.atomic_files import PartsWriter, replacing, write_whole
from data_pipelines.image.map_png import decode_maps
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.shards.hashes import FileHash
from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.shards.tar_write import END_OF_ARCHIVE, Record, make_record
from data_pipelines.sources.listing import ListedImage, Reader
from data_pipelines.sources.pairs import check_pair
from data_pipelines.sources.ranges import WHOLE, member_path
from data_pipelines.text.pieces import TARGET, TextWindows
from data_pipelines.writing.image_header import ImageHeader, orientation
from data_pipelines.writing.prepare import ImageOptions, prepare_image
from data_pipelines.writing.rows import DoneShard, Rejected, RowTable, done_path, save_done
from data_pipelines.writing.shard_plan import Plan

QUARANTINE_FOLDER = "quarantine"
_LONGEST_NAME = 150


def shard_file(index: int) -> str:
    """Name of the shard's tar."""
    return f"shard-{index:06d}.tar"


def is_done(folder: Path, index: int) -> bool:
    """Whether the shard was completed: its marker appears after its tar was flushed and renamed."""
    return done_path(folder, index).exists() and (folder / shard_file(index)).exists()


def write_shard(plan: Plan, index: int, folder: Path, *, options: ImageOptions, reader: Reader) -> DoneShard:
    """Writes shard `index` of the plan into `folder`, then its done-marker, which is returned.

    Raises ValueError for a bad image under the policy "fail", OSError when the disk is full or a source unreadable.
    """
    class_names = plan.listing.class_names
    rejected: list[Rejected] = []
    num_turned = 0
    text = plan.arguments.get("text")
    with replacing(folder / shard_file(index), folder / WORK_FOLDER) as file:
        writer = _Writer(file, FileHash(plan.arguments["hash_name"]), plan.listing.members)
        for listed in plan.listing.images(int(plan.starts[index]), int(plan.starts[index + 1])):
            image = reader.read(listed.path, listed.offset, listed.length)
            paths = {name: member_path(listed.path, name) for name in plan.listing.members}
            members = {name: reader.read(path, listed.offset, WHOLE) for name, path in paths.items()}
            try:
                if text:
                    stored, header = image, text_header(listed, image, members, TextWindows(**text))
                else:
                    stored, header = prepare_image(image, options)
                decode_maps(members, members.__getitem__, header.height, header.width, len(class_names))
            except BadImageError as error:
                rejected.append(Rejected(key=listed.key, name=listed.name, reason=str(error)))
                _apply_policy(rejected[-1], image, options, folder)
                continue
            metadata = _metadata(listed, class_names, reader) if options.metadata else None
            record = make_record(listed.key, header.extension, stored, listed.label, metadata, members)
            writer.add(listed, header, record)
            num_turned += not text and orientation(stored) != 1
        done = replace(writer.finish(shard_file(index), rejected), num_turned=num_turned)
    save_done(folder, index, done)
    return done


def text_header(listed: ListedImage, data: bytes, members: Mapping[str, bytes], windows: TextWindows) -> ImageHeader:
    """What the index says of a window of text: its bytes and those that count, where images have width and height.

    Of a pair: the bytes of its source and of its target. Raises BadImageError for one that is bad.
    """
    if TARGET in members:
        check_pair(data, members[TARGET], windows.window)
        return ImageHeader(extension="source", width=len(data), height=len(members[TARGET]))
    return ImageHeader(extension="txt", width=listed.length, height=windows.num_counted(listed.offset, listed.length))


def _metadata(listed: ListedImage, class_names: Sequence[str], reader: Reader) -> bytes:
    """The text of the .json member: that of the source as it is, or else class and origin."""
    if listed.metadata_length:
        return reader.read(listed.path, listed.metadata_offset, listed.metadata_length)
    return json.dumps({"class": class_names[listed.label], "source": listed.name}).encode()


def _apply_policy(bad: Rejected, image: bytes, options: ImageOptions, folder: Path) -> None:
    if options.on_bad == "fail":
        raise ValueError(
            f"{bad.name!r}: {bad.reason}; remove it from the source, or leave such samples out with"
            " --on-bad skip or --on-bad quarantine"
        )
    if options.on_bad == "quarantine":
        # Keys have slashes; one flat folder is easier to look through. No file system takes names above 255 bytes.
        name = bad.key.replace("/", "%2F")
        if len(name) > _LONGEST_NAME:
            name = hashlib.sha256(bad.key.encode()).hexdigest()
        target = folder / QUARANTINE_FOLDER / name
        target.parent.mkdir(exist_ok=True)
        write_whole(target, image)


class _Writer:
    """Writes records to a file, and keeps their rows and the hash of the whole."""

    def __init__(self, file: BinaryIO, file_hash: FileHash, members: Iterable[str]) -> None:
        self._file = PartsWriter(file)
        self._rows = RowTable(members)
        self._hash = file_hash

    def add(self, listed: ListedImage, header: ImageHeader, record: Record) -> None:
        position, of_members = self._file.position, dict[str, int]()
        for name, (offset, length, crc) in record.members.items():
            of_members |= {f"offset.{name}": position + offset, f"length.{name}": length, f"crc.{name}": crc}
        self._rows.add(
            listed.key,
            offset=position + len(record.before),
            length=len(record.image),
            label=listed.label,
            crc=record.image_crc,
            width=header.width,
            height=header.height,
            record_offset=position,
            frame_crc=record.frame_crc,
            **of_members,
        )
        self._put(record.before, record.image, record.after)

    def finish(self, name: str, rejected: list[Rejected]) -> DoneShard:
        end = self._file.position
        self._put(END_OF_ARCHIVE)
        return DoneShard(
            file=name,
            bytes=self._file.position,
            hash=str(self._hash),
            end=end,
            columns=self._rows.columns(),
            rejected=rejected,
        )

    def _put(self, *parts: bytes) -> None:
        self._file.write(*parts)
        for part in parts:
            self._hash.update(part)
