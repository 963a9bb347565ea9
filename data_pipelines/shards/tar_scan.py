"""A strict reader of tar files for checking and indexing: every block is accounted for, nothing is skipped in silence.

Python's tarfile and webdataset take a file that is cut off at a member for a shorter one. Here a tar must end with its
end-of-archive marker, every header must match its checksum, and links, devices and paths out of the folder are refused.
"""

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_pipelines.shards.tar_write import BLOCK

_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY, _GLOBAL_PAX, _PAX, _GNU_LONG_NAME = b"5", b"g", b"x", b"L"
_ZERO_BLOCK = bytes(BLOCK)
_LONGEST_NAME = 1 << 16


class TarError(ValueError):
    """What is wrong with a tar, and the offset in bytes where it was seen."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Member:
    """A regular file in a tar: its record is [start, data_end + padding), its content `size` bytes at `offset`."""

    name: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """Consecutive members of one key, as webdataset groups them. `members` by ending in lower case, without dot."""

    key: str
    start: int
    members: dict[str, Member] = field(default_factory=dict)


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The content of a file, mapped into memory."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as data:
            yield data


def scan_members(data: memoryview) -> Iterator[Member]:
    """The regular files in a tar. Raises TarError at the first thing that a sound, safe tar would not have."""
    if bytes(data[:2]) == b"\x1f\x8b":
        raise TarError(0, "is gzip, not tar; unpack it with gunzip")
    position = 0
    while True:
        start, extended = position, dict[str, str]()
        while True:
            header = bytes(data[position : position + BLOCK])
            if len(header) < BLOCK:
                raise TarError(position, "cut off: no end-of-archive marker")
            if header == _ZERO_BLOCK:
                _check_end(data, position)
                return
            kind, size = header[156:157], _checked_size(header, position)
            content = position + BLOCK
            if content + size > len(data):
                raise TarError(position, f"cut off: a member of {size:,} bytes, {len(data) - content:,} are there")
            if kind not in (_PAX, _GLOBAL_PAX, _GNU_LONG_NAME):
                break
            if size > _LONGEST_NAME:
                raise TarError(position, f"an extended header of {size:,} bytes")
            text = bytes(data[content : content + size])
            if kind == _PAX:
                extended |= _pax_fields(text, position)
            elif kind == _GNU_LONG_NAME:
                extended["path"] = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            position = content + -(-size // BLOCK) * BLOCK
        name = extended.get("path") or _name(header)
        size = int(extended.get("size", size))
        _check_name(name, position)
        if kind in _REGULAR:
            member = Member(name=name, start=start, offset=content, size=size)
            if member.end > len(data):
                raise TarError(position, f"cut off inside {name!r}")
            yield member
        elif kind != _DIRECTORY:
            raise TarError(position, f"{name!r} is a link, device or other special member, which shards must not have")
        position = content + -(-size // BLOCK) * BLOCK


def scan_samples(data: memoryview) -> Iterator[TarSample]:
    """The samples in a tar, grouped as webdataset does: by the name up to the first dot of its last part."""
    sample: TarSample | None = None
    for member in scan_members(data):
        key, extension = split_name(member.name)
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key=key, start=member.start)
        if extension in sample.members:
            raise TarError(member.start, f"two members {member.name!r} in one sample")
        sample.members[extension] = member
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str]:
    """Key and ending (lower case) of a member's name."""
    match = re.fullmatch(r"((?:.*/)?[^/.]+)(?:\.([^/]*))?", name, re.DOTALL)
    return (match[1], (match[2] or "").lower()) if match else (name, "")


def _checked_size(header: bytes, position: int) -> int:
    try:
        expected = int(header[148:156].rstrip(b"\0 ").lstrip(b" ") or b"0", 8)
        if header[124] & 0x80:
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].rstrip(b"\0 ").lstrip(b" ") or b"0", 8)
    except ValueError:
        raise TarError(position, "not a tar header") from None
    if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
        raise TarError(position, "the checksum of a tar header is wrong")
    return size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax_fields(text: bytes, position: int) -> dict[str, str]:
    fields: dict[str, str] = {}
    while text:
        digits = text.partition(b" ")[0]
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(text):
            raise TarError(position, "a broken extended header")
        name, _, value = text[len(digits) + 1 : int(digits) - 1].partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[int(digits) :]
    return fields


def _check_name(name: str, position: int) -> None:
    if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise TarError(position, f"the name {name!r} leads out of the folder")


def _check_end(data: memoryview, position: int) -> None:
    tail = data[position:]
    if len(tail) < 2 * BLOCK:
        raise TarError(position, "cut off inside the end-of-archive marker")
    if bytes(tail).count(0) != len(tail):
        raise TarError(position, "data after the end-of-archive marker")
