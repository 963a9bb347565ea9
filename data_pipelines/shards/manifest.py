"""manifest.json: what a shard set is, in a file that notices when it was changed.

    manifest.json --names, sizes, hashes--> index.npz, shard-000000.tar, shard-000001.tar, ...

`sha256` is the hash of the manifest's own bytes with its 64 digits replaced by zeros, so that one flipped bit anywhere
is seen. `fingerprint` identifies the content: it changes when any byte of a shard or any class name changes, and not
when files are renamed or moved. docs/shards.md describes every field. Version 1 knew only SHA-256 as the hash of a tar;
it is read, not written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "sret_scale shards"
VERSION = 2
_READABLE = (1, 2)
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
_NO_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One tar of the set. `end` is where its last sample ends; what follows is the end-of-archive marker.

    `hash` is that of the whole file, as `data_pipelines.shards.hashes` writes it.
    """

    file: str
    bytes: int
    hash: str
    end: int
    num_samples: int
    class_counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest's fields. `writer`: the arguments that made the shards; `num_rejected`: images left out."""

    class_names: list[str]
    fingerprint: str
    index_bytes: int
    index_sha256: str
    shards: list[ShardEntry]
    num_rejected: int
    writer: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


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
        "version": VERSION,
        "num_samples": manifest.num_samples,
        "num_classes": len(manifest.class_names),
        "num_rejected": manifest.num_rejected,
        "fingerprint": manifest.fingerprint,
        "index_bytes": manifest.index_bytes,
        "index_sha256": manifest.index_sha256,
        "writer": dict(manifest.writer),
        "class_names": manifest.class_names,
    }
    lines = [f'"{name}": {json.dumps(value)},' for name, value in head.items()]
    shards = ",\n".join(json.dumps(asdict(shard)) for shard in manifest.shards)
    body = ("{\n" + "\n".join(lines) + f'\n"shards": [\n{shards}\n],\n').encode("ascii")
    return body + _seal(hashlib.sha256(body + _seal(_NO_HASH)).hexdigest())


def _seal(digest: str) -> bytes:
    return f'"sha256": "{digest}"\n}}\n'.encode("ascii")


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a shard folder. Raises ValueError when it was changed, FileNotFoundError without one."""
    path = folder / MANIFEST_NAME
    data = path.read_bytes()
    try:
        fields = json.loads(data)
        form, version = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a shard manifest or a damaged one ({error}); write the shards again") from error
    if form != FORMAT or version not in _READABLE:
        raise ValueError(
            f"{path}: expected format {FORMAT!r} of version {' or '.join(map(str, _READABLE))}, got {form!r} of version"
            f" {version}; use the version of sret-scale that wrote it"
        )
    body = data[: -len(_seal(_NO_HASH))]
    digest = hashlib.sha256(body + _seal(_NO_HASH)).hexdigest()
    if data != body + _seal(digest):
        raise ValueError(f"{path}: its content does not match its own sha256, so it was changed; write it again")
    manifest = Manifest(
        class_names=fields["class_names"],
        fingerprint=fields["fingerprint"],
        index_bytes=fields["index_bytes"],
        index_sha256=fields["index_sha256"],
        shards=[_shard_entry(shard, version) for shard in fields["shards"]],
        num_rejected=fields["num_rejected"],
        writer=fields["writer"],
    )
    if content_fingerprint(manifest.shards, manifest.class_names, version) != manifest.fingerprint:
        raise ValueError(f"{path}: the fingerprint does not belong to the shards listed in it; write it again")
    return manifest


def _shard_entry(fields: dict[str, Any], version: int) -> ShardEntry:
    if version == 1:
        fields = {name: value for name, value in fields.items() if name != "sha256"} | {
            "hash": f"sha256:{fields['sha256']}"
        }
    return ShardEntry(**fields)
