"""A reader of shard sets written from docs/shards.md alone, with nothing of data_pipelines: the page must be enough."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One record: the image with its ending and size, the label, and what `.json` says."""

    key: str
    extension: str
    image: bytes
    size: tuple[int, int]
    label: int
    metadata: Any
    members: dict[str, bytes]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its seal, fingerprint and the index checked."""
    data = (folder / "manifest.json").read_bytes()
    manifest: dict[str, Any] = json.loads(data)
    assert manifest["format"] == "sret_scale shards" and manifest["version"] == (3 if "members" in manifest else 2)
    digits = manifest["sha256"].encode()
    assert data.splitlines()[-2] == b'"sha256": "%s"' % digits
    start = data.rindex(digits)
    assert hashlib.sha256(data[:start] + b"0" * 64 + data[start + 64 :]).hexdigest().encode() == digits
    lines = [f"sret_scale shards {manifest['version']}\n"]
    lines += [f"{shard['hash']} {shard['bytes']} {shard['num_samples']}\n" for shard in manifest["shards"]]
    names = json.dumps(manifest["class_names"])
    assert hashlib.sha256(("".join(lines) + names).encode()).hexdigest() == manifest["fingerprint"]
    index = (folder / "index.npz").read_bytes()
    assert (len(index), hashlib.sha256(index).hexdigest()) == (manifest["index_bytes"], manifest["index_sha256"])
    assert sum(shard["num_samples"] for shard in manifest["shards"]) == manifest["num_samples"]
    assert len(manifest["class_names"]) == manifest["num_classes"]
    return manifest


def read_samples(folder: Path) -> Iterator[Sample]:
    """All samples in order, every byte of the tars checked."""
    manifest = read_manifest(folder)
    others = manifest.get("members", [])
    names = [*_TYPES, *(f"{of}.{name}" for name in others for of in ("offset", "length", "crc"))]
    index = {name: _column(folder / "index.npz", name) for name in names}
    for number, shard in enumerate(manifest["shards"]):
        tar = (folder / shard["file"]).read_bytes()
        method, _, digest = shard["hash"].partition(":")
        assert len(tar) == shard["bytes"] and _HASHES[method](tar).hexdigest() == digest
        rows = np.flatnonzero(index["shard_of"] == number).tolist()
        ends = [*(int(index["record_offset"][row]) for row in rows[1:]), shard["end"]]
        labels = [int(index["label"][row]) for row in rows]
        assert len(rows) == shard["num_samples"]
        assert [labels.count(label) for label in range(manifest["num_classes"])] == shard["class_counts"]
        assert tar[shard["end"] :] == bytes(1024)
        for row, end in zip(rows, ends, strict=True):
            yield _sample(index, row, tar, end, others)


def _sample(index: dict[str, Any], row: int, tar: bytes, end: int, others: list[str]) -> Sample:
    start, offset, length = (int(index[name][row]) for name in ("record_offset", "offset", "length"))
    image = tar[offset : offset + length]
    assert zlib.crc32(image) == index["crc"][row]
    assert zlib.crc32(tar[start:offset] + tar[offset + length : end]) == index["frame_crc"][row]
    key_start = int(index["key_end"][row - 1]) if row else 0
    key = index["key_bytes"][key_start : index["key_end"][row]].tobytes().decode()
    members = dict(_members(tar[start:end]))
    extension = next(name for name in members if name not in ("cls", "json", *others))
    for name in others:
        start, length = int(index[f"offset.{name}"][row]), int(index[f"length.{name}"][row])
        assert members[name] == (key, tar[start : start + length])
        assert zlib.crc32(members[name][1]) == index[f"crc.{name}"][row]
    assert members[extension] == (key, image) and int(members["cls"][1]) == index["label"][row]
    return Sample(
        key=key,
        extension=extension,
        image=image,
        size=(int(index["width"][row]), int(index["height"][row])),
        label=int(index["label"][row]),
        metadata=json.loads(members["json"][1]) if "json" in members else None,
        members={name: members[name][1] for name in others},
    )


def _members(record: bytes) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """(ending, (key, content)) of the members of a record: POSIX ustar, pax headers for long names."""
    long_name = ""
    while record:
        header, size = record[:512], int(record[124:136].rstrip(b"\0"), 8)
        content, record = record[512 : 512 + size], record[512 + -(-size // 512) * 512 :]
        assert header[257:263] == b"ustar\0"
        if header[156:157] == b"x":
            [long_name] = (line.partition("path=")[2] for line in content.decode().splitlines())
            continue
        name, long_name = long_name or header[:100].rstrip(b"\0").decode(), ""
        key, _, ending = name.partition(".")
        yield ending, (key, content)


def _column(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        assert info.compress_type == zipfile.ZIP_STORED
        column = np.load(io.BytesIO(archive.read(info)), allow_pickle=False)
    assert column.dtype == np.dtype(_TYPES[name.partition(".")[0]]) and column.ndim == 1
    return column


_HASHES: dict[str, Callable[[bytes], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}

_TYPES = {
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
