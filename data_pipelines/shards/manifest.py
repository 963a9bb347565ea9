"""manifest.json: what a shard set is, in a file that notices when it was changed.

    manifest.json --names, sizes, hashes--> index.npz, shard-000000.tar, shard-000001.tar, ...

`sha256` is the hash of the manifest's own bytes with its 64 digits replaced by zeros, so that one flipped bit anywhere
is seen. `fingerprint` identifies the content: it changes when any byte of a shard or any class name changes, and not
when files are renamed or moved. docs/shards.md describes every field. Version 1 knew only SHA-256 as the hash of a tar;
it is read, not written. Version 3 is written for sets whose samples have members beside image and label.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, AliasChoices, BeforeValidator, FailFast, Field, StringConstraints

from data_pipelines.checked_files import MAX_JSON_BYTES, parse_checked, plain_name, read_bounded

FORMAT = "sret_scale shards"
VERSION, _MEMBERS_VERSION = 2, 3
_READABLE = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
_NO_HASH = "0" * 64
# A sample takes two headers in its tar at the least.
_SMALLEST_RECORD_BYTES = 1024


def tar_name(name: str) -> str:
    """`name`, if it is that of a tar in its folder. Raises ValueError: the cache has other files under other names."""
    if not plain_name(name).endswith(".tar") or name == ".tar":
        raise ValueError("expected the name of a .tar file")
    return name


# What a manifest may say, wherever it comes from. Sums of counts fit into 64 bits.
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Hash = Annotated[
    str,
    # Version 1 has the digits of a SHA-256, under that name.
    Field(validation_alias=AliasChoices("hash", "sha256")),
    StringConstraints(pattern="^(xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64})$"),
    BeforeValidator(lambda value: f"sha256:{value}" if isinstance(value, str) and ":" not in value else value),
]


def _with_sound_location(writer: Mapping[str, Any]) -> Mapping[str, Any]:
    place = writer.get("location", "/")
    if not isinstance(place, str) or "\0" in place or not (place.startswith("/") or "://" in place):
        raise ValueError("location: expected a folder from the root or a URL")
    return writer


# The ending of a member beside image, label and metadata; it is part of the names of columns in the index.
_MemberName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}(\.[a-z0-9_]{1,8})?$")]
INDEX_BYTES_A_SAMPLE = 56


def max_index_bytes(num_samples: int) -> int:
    """The size of the largest index that is read or written, keys of 72 bytes included.

    Columns alone take 56 bytes a sample, and the keys of ImageNet-21k 25: a bound of 64 would refuse it.
    """
    return 64 * 2**20 + (INDEX_BYTES_A_SAMPLE + 72) * num_samples


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of the set. `end` is where its last sample ends; what follows is the end-of-archive marker.

    `hash` is that of the whole file, as `data_pipelines.shards.hashes` writes it.
    """

    file: Annotated[str, AfterValidator(tar_name)]
    bytes: _Count
    hash: _Hash
    end: _Count
    num_samples: _Count
    class_counts: Annotated[list[_Count], FailFast()]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest's fields. `writer`: the arguments that made the shards; `num_rejected`: images left out.

    `members`: the endings of what samples have beside image, label and metadata, such as `map.png`.
    """

    class_names: Annotated[list[str], FailFast()]
    fingerprint: _Sha256
    index_bytes: _Count
    index_sha256: _Sha256
    shards: Annotated[list[ShardEntry], FailFast()]
    num_rejected: _Count
    writer: Annotated[Mapping[str, Any], AfterValidator(_with_sound_location)]
    members: Annotated[list[_MemberName], Field(max_length=16), FailFast()] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def format_version(members: Sequence[str]) -> int:
    """The version of the format in which a set with these members is written."""
    return _MEMBERS_VERSION if members else VERSION


def content_fingerprint(shards: Sequence[ShardEntry], class_names: Sequence[str], version: int = VERSION) -> str:
    """SHA-256 (hex) of the shards' hashes in order and of the class names."""
    digest = hashlib.sha256(f"{FORMAT} {version}\n".encode())
    for shard in shards:
        tar_hash = shard.hash.removeprefix("sha256:") if version == 1 else shard.hash
        digest.update(f"{tar_hash} {shard.bytes} {shard.num_samples}\n".encode())
    digest.update(json.dumps(list(class_names)).encode())
    return digest.hexdigest()


def render_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: one line a field and a shard, so that people can read and compare it."""
    head = {
        "format": FORMAT,
        "version": format_version(manifest.members),
        "num_samples": manifest.num_samples,
        "num_classes": len(manifest.class_names),
        "num_rejected": manifest.num_rejected,
        "fingerprint": manifest.fingerprint,
        "index_bytes": manifest.index_bytes,
        "index_sha256": manifest.index_sha256,
        "writer": dict(manifest.writer),
        **({"members": manifest.members} if manifest.members else {}),
        "class_names": manifest.class_names,
    }
    lines = [f'"{name}": {json.dumps(value)},' for name, value in head.items()]
    shards = ",\n".join(json.dumps(asdict(shard)) for shard in manifest.shards)
    body = ("{\n" + "\n".join(lines) + f'\n"shards": [\n{shards}\n],\n').encode("ascii")
    return body + _seal(hashlib.sha256(body + _seal(_NO_HASH)).hexdigest())


def _seal(digest: str) -> bytes:
    return f'"sha256": "{digest}"\n}}\n'.encode("ascii")


class _Head(pydantic.BaseModel):
    """What says that the rest can be read."""

    format: Any
    version: Any


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a shard folder. Raises ValueError when it was changed, FileNotFoundError without one."""
    path = folder / MANIFEST_NAME
    return parse_manifest(read_bounded(path, MAX_JSON_BYTES), path)


def parse_manifest(data: bytes, source: str | Path) -> Manifest:
    """The checked manifest in `data`; `source` names it in what is raised: ValueError when it was changed."""
    head = parse_checked(data, _Head, source)
    if head.format != FORMAT or head.version not in _READABLE:
        raise ValueError(
            f"{source}: expected format {FORMAT!r} of version {_READABLE[0]} to {_READABLE[-1]}, got"
            f" {head.format!r:.60} of version {head.version!r:.60}; use the version of sret-scale that wrote it"
        )
    body = data[: -len(_seal(_NO_HASH))]
    digest = hashlib.sha256(body + _seal(_NO_HASH)).hexdigest()
    if data != body + _seal(digest):
        raise ValueError(f"{source}: its content does not match its own sha256, so it was changed; write it again")
    manifest = parse_checked(data, Manifest, source)
    if content_fingerprint(manifest.shards, manifest.class_names, head.version) != manifest.fingerprint:
        raise ValueError(f"{source}: the fingerprint does not belong to the shards listed in it; write it again")
    _check_sizes(manifest, source)
    return manifest


def _check_sizes(manifest: Manifest, source: str | Path) -> None:
    """Raises ValueError for sizes that no writer gives, and that would let others read or reserve what they like."""
    for shard in manifest.shards:
        if not shard.num_samples * _SMALLEST_RECORD_BYTES <= shard.end <= shard.bytes:
            raise ValueError(
                f"{source}: {shard.file!r}: {shard.num_samples} samples cannot end at {shard.end} of {shard.bytes};"
                " write it again"
            )
    if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
        raise ValueError(f"{source}: lists a shard twice; write it again")
    if manifest.index_bytes > max_index_bytes(manifest.num_samples):
        raise ValueError(
            f"{source}: an index of {manifest.index_bytes:,} bytes for {manifest.num_samples:,} samples, expected at"
            f" most {max_index_bytes(manifest.num_samples):,}; write it again"
        )
