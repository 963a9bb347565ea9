"""Samples as tar members, byte for byte the same on every machine.

    record of a sample:  [header KEY.jpg][image, padded to 512][header KEY.cls][label][header KEY.json][metadata]
    shard:               record, record, ..., end-of-archive (two blocks of zeros)

Ordinary POSIX tar with fixed time, owner and mode, as webdataset reads it.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK)


# What `safe_key` gives: such keys are kept as they are when shards are written again.
_SAFE_KEY = re.compile(r"[A-Za-z0-9_/+=,@%-]+")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample as it stands in a tar: `image_start` counts from the first byte of `data`."""

    data: bytes
    image_start: int
    image_crc: int


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
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % BLOCK)


def make_record(key: str, extension: str, image: bytes, label: int, metadata: Mapping[str, Any] | None) -> Record:
    """The record of one sample. `metadata` None leaves the .json member out."""
    first = member(f"{key}.{extension}", image)
    parts = [first, member(f"{key}.cls", str(label).encode())]
    if metadata is not None:
        parts.append(member(f"{key}.json", json.dumps(metadata, sort_keys=True).encode()))
    image_start = len(first) - len(image) - (-len(image) % BLOCK)
    return Record(data=b"".join(parts), image_start=image_start, image_crc=zlib.crc32(image))
