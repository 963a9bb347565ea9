"""A strict reader of tar files for checking and indexing: every block is accounted for, nothing is skipped in silence.

Python's tarfile and webdataset take a file that is cut off at a member for a shorter one. Here a tar must end with its
end-of-archive marker and nothing behind it, every header must match its checksum, numbers are digits and not negative,
so that each position is larger than the last; links, devices and paths out of the folder are refused. What webdataset
passes over, because it belongs to no sample (README, `._NAME`, `__meta__`), is passed over here too, and counted.
"""

import mmap
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_pipelines.checked_files import open_regular
from data_pipelines.shards.tar_write import BLOCK

_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY, _GLOBAL_PAX, _PAX, _GNU_LONG_NAME = b"5", b"g", b"x", b"L"
_ZERO_BLOCK = bytes(BLOCK)
_LONGEST_NAME = 1 << 16
_CHUNK_BYTES = 1 << 20
_LONGEST_EXTENSION = 1 << 20
# Mode, owner, group, size, time and checksum: octal digits between spaces, ended by NUL or space.
_NUMBERS = (slice(100, 108), slice(108, 116), slice(116, 124), slice(124, 136), slice(136, 148), slice(148, 156))
_OCTAL = re.compile(rb" *[0-7]*[ \0]*")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=\n]+)=")


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
    with open_regular(path) as file:
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
        start, extended = position, dict[str, bytes]()
        while True:
            header = bytes(data[position : position + BLOCK])
            if len(header) < BLOCK:
                raise TarError(position, "cut off: no end-of-archive marker")
            if header == _ZERO_BLOCK:
                _check_end(data, position)
                return
            kind, size = header[156:157], _checked_size(header, position)
            if kind not in (_PAX, _GLOBAL_PAX, _GNU_LONG_NAME):
                break
            if size > _LONGEST_EXTENSION:
                raise TarError(position, f"an extended header of {size:,} bytes")
            end = _end_of(data, position, size)
            text = bytes(data[position + BLOCK : position + BLOCK + size])
            extended |= {"path": text.rstrip(b"\0")} if kind == _GNU_LONG_NAME else _pax_fields(text, position)
            if kind == _GLOBAL_PAX and extended:
                raise TarError(position, f"a header that sets {', '.join(extended)} for all members")
            position = end
        name = (extended.get("path") or _name(header)).decode("utf-8", "surrogateescape")
        size = int(extended.get("size", size))
        end = _end_of(data, position, size)
        _check_name(name, position)
        if kind in _REGULAR:
            yield Member(name=name, start=start, offset=position + BLOCK, size=size)
        elif kind != _DIRECTORY:
            raise TarError(position, f"{name!r} is a link, device or other special member, which shards must not have")
        position = end


def scan_samples(data: memoryview, passed_over: Counter[str] | None = None) -> Iterator[TarSample]:
    """The samples in a tar, grouped as webdataset does: by the name up to the first dot of its last part.

    The names of members that belong to no sample are counted in `passed_over`.
    """
    sample: TarSample | None = None
    for member in scan_members(data):
        parts = split_name(member.name)
        if parts is None:
            if passed_over is not None:
                passed_over[member.name] += 1
            continue
        key, extension = parts
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key=key, start=member.start)
        if extension in sample.members:
            raise TarError(member.start, f"two members {member.name!r} in one sample")
        sample.members[extension] = member
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str] | None:
    """Key and ending (lower case) of a member's name; None for one that belongs to no sample.

    Those have no ending (README), begin with a dot (`._NAME`: what macOS adds), or are webdataset's (`__meta__`).
    """
    match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]*)", name, re.DOTALL)
    if match is None or re.match(r"__meta__($|/)", name):
        return None
    return match[1], match[2].lower()


def describe_passed_over(passed_over: Counter[str]) -> str:
    """One line about members that belong to no sample."""
    name = next(iter(passed_over))
    return f"passed over {passed_over.total():,} members of the tars that belong to no sample, such as {name!r}"


def _checked_size(header: bytes, position: int) -> int:
    size, checksum = header[124:136], header[148:156]
    if any(not _OCTAL.fullmatch(header[field]) and header[field][0] < 0x80 for field in _NUMBERS) or checksum[0] > 0x7F:
        raise TarError(position, "not a tar header")
    if sum(header) - sum(checksum) + 8 * 32 != int(checksum.strip(b"\0 ") or b"0", 8):
        raise TarError(position, "the checksum of a tar header is wrong")
    if size[0] < 0x80:
        return int(size.strip(b"\0 ") or b"0", 8)
    if size[0] > 0x80:
        raise TarError(position, "a negative size")
    return int.from_bytes(size[1:], "big")


def _end_of(data: memoryview, position: int, size: int) -> int:
    """Where the member with its header at `position` ends, padding included."""
    there = len(data) - position - BLOCK
    end = position + BLOCK + -(-size // BLOCK) * BLOCK
    if end > len(data):
        raise TarError(position, f"cut off: a member of {size:,} bytes, {there:,} are there")
    return end


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_fields(text: bytes, position: int) -> dict[str, bytes]:
    """Path and size, where an extended header has them; the rest says nothing of the content."""
    fields: dict[str, bytes] = {}
    place = 0
    while place < len(text):
        record = _PAX_RECORD.match(text, place)
        end = place + int(record[1]) if record else 0
        if not record or not record.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            raise TarError(position, "a broken extended header")
        value = text[record.end() : end - 1]
        if record[2].startswith(b"GNU.sparse."):
            raise TarError(position, "a sparse file, which shards must not have")
        if record[2] == b"size" and not re.fullmatch(rb"[0-9]{1,19}", value):
            raise TarError(position, f"a size of {value[:20]!r}")
        if record[2] in (b"path", b"size"):
            fields[record[2].decode()] = value
        place = end
    return fields


def _check_name(name: str, position: int) -> None:
    if len(name) > _LONGEST_NAME or "\0" in name:
        raise TarError(position, f"a name of {len(name):,} characters, or with NUL in it")
    if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise TarError(position, f"the name {name!r} leads out of the folder")


def _check_end(data: memoryview, position: int) -> None:
    if len(data) - position < 2 * BLOCK:
        raise TarError(position, "cut off inside the end-of-archive marker")
    for start in range(position, len(data), _CHUNK_BYTES):
        # A copy: a view that an error keeps alive would hinder the closing of the file.
        chunk = bytes(data[start : start + _CHUNK_BYTES])
        if chunk.count(0) != len(chunk):
            place = start + len(chunk) - len(chunk.lstrip(b"\0"))
            is_tar = bytes(data[place + 257 : place + 262]) == b"ustar"
            what = "a second tar; make one file of each" if is_tar else "other bytes; get the tar again"
            raise TarError(position, f"data after the end-of-archive marker, at {place:,}: {what}")
