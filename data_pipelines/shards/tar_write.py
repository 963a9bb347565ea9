"""Samples as tar members, byte for byte the same on every machine.

    record of a sample:  [header KEY.jpg][image, padded to 512][header KEY.cls][label][header KEY.json][metadata]
    shard:               record, record, ..., end-of-archive (two blocks of zeros)

Ordinary POSIX tar with fixed time, owner and mode, as webdataset reads it.
"""

import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK)


# The fields of a POSIX header in order: name, owner (mode 0644, ids 0), size, time 0, checksum, and the rest: a regular
# file, no link, "ustar" version 00, no names of owners. The checksum counts its own field as eight spaces.
_LONGEST_SHORT_NAME = 100
_FIRST_LARGE_SIZE = 8**11
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_REST_SUM = sum(_REST) + 8 * ord(" ")

# What `safe_key` gives: such keys are kept as they are when shards are written again.
_SAFE_KEY = re.compile(r"[A-Za-z0-9_/+=,@%-]+")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample as it stands in a tar, in three parts: what comes before the image, the image, what comes after it.

    The frame is the record without the image: headers, padding, label, metadata and further members. `members`: where
    in the record each of these begins, its bytes and its checksum.
    """

    before: bytes
    image: bytes
    after: bytes
    image_crc: int
    frame_crc: int
    members: Mapping[str, tuple[int, int, int]]

    @property
    def num_bytes(self) -> int:
        return len(self.before) + len(self.image) + len(self.after)


def safe_key(name: str) -> str:
    """`name` (with slashes, without its ending) as a key that every tar reader keeps.

    webdataset cuts a name at the first dot of its last part, and quotes or newlines break lists of keys, so all but
    letters, digits and `/_-+=,@` becomes %XX. No two names have the same key, and no key leads out of a folder.
    """
    return quote(name.encode("utf-8", "surrogateescape"), safe="/_-+=,@").replace(".", "%2E").replace("~", "%7E")


def is_safe_key(key: str) -> bool:
    """Whether a key can stand in a tar as it is."""
    return _SAFE_KEY.fullmatch(key) is not None and not key.startswith("/")


def member(name: str, data: bytes) -> bytes:
    """One tar member: header, data, padding."""
    return _header(name, len(data)) + data + _padding(len(data))


def make_record(
    key: str, extension: str, image: bytes, label: int, metadata: bytes | None, members: Mapping[str, bytes]
) -> Record:
    """The record of one sample. `members`: by ending; `metadata`: the text of the .json member, None leaves it out."""
    before = _header(f"{key}.{extension}", len(image))
    after, places = _padding(len(image)), {}
    for name, data in members.items():
        header = _header(f"{key}.{name}", len(data))
        places[name] = len(before) + len(image) + len(after) + len(header), len(data), zlib.crc32(data)
        after += header + data + _padding(len(data))
    after += member(f"{key}.cls", str(label).encode())
    if metadata is not None:
        after += member(f"{key}.json", metadata)
    crcs = {"image_crc": zlib.crc32(image), "frame_crc": frame_crc(before, after)}
    return Record(before=before, image=image, after=after, members=places, **crcs)


def frame_crc(before: bytes | memoryview, after: bytes | memoryview) -> int:
    """Checksum of a record without its image, so that no byte is summed twice: images are most of a shard."""
    return zlib.crc32(after, zlib.crc32(before))


def _header(name: str, num_bytes: int) -> bytes:
    """The header that tarfile makes; for a short name it is filled in here, which takes 3 us instead of 50."""
    if len(name) <= _LONGEST_SHORT_NAME and name.isascii() and num_bytes < _FIRST_LARGE_SIZE:
        start = name.encode().ljust(_LONGEST_SHORT_NAME, b"\0") + _OWNER + b"%011o\0" % num_bytes + _TIME
        checksum = sum(start) + _REST_SUM
        return start + b"%06o\0 " % checksum + _REST
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % BLOCK)
