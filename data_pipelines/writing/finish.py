"""Joins written shards to a shard set: the index, the list of what was left out, and last the manifest."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import MAX_JSON_BYTES
from data_pipelines.shards.index import COLUMNS, column_types, render_index
from data_pipelines.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    content_fingerprint,
    format_version,
    max_index_bytes,
    render_manifest,
)
from data_pipelines.writing.rows import DoneShard

REJECTED_NAME = "rejected.jsonl"


def finish_shards(
    folder: Path,
    shards: Sequence[DoneShard],
    *,
    class_names: Sequence[str],
    writer: Mapping[str, Any],
    members: Sequence[str] = (),
) -> Manifest:
    """Writes index and manifest for shards that lie complete in `folder`; the set exists from then on."""
    entries = [_entry(shard, len(class_names)) for shard in shards]
    rejected = [item for shard in shards for item in shard.rejected]
    if rejected:
        write_whole(folder / REJECTED_NAME, b"".join(json.dumps(asdict(item)).encode() + b"\n" for item in rejected))
    index = render_index(_joined(shards, members), members)
    check_sizes(len(index), max_index_bytes(sum(shard.num_samples for shard in shards)), 0)
    write_whole(folder / INDEX_NAME, index)
    manifest = Manifest(
        class_names=list(class_names),
        fingerprint=content_fingerprint(entries, class_names, format_version(members)),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=entries,
        num_rejected=len(rejected),
        writer=writer,
        members=list(members),
    )
    rendered = render_manifest(manifest)
    check_sizes(0, 0, len(rendered))
    write_whole(folder / MANIFEST_NAME, rendered)
    return manifest


def check_sizes(index_bytes: int, most_index_bytes: int, manifest_bytes: int) -> None:
    """Raises ValueError where index or manifest have more bytes than readers take."""
    if index_bytes > most_index_bytes:
        raise ValueError(
            f"the keys take too much: an index of {index_bytes:,} bytes, at most {most_index_bytes:,};"
            " shorten the names of files and folders in the source"
        )
    if manifest_bytes > MAX_JSON_BYTES:
        raise ValueError(
            f"shards times classes are too many: a manifest of {manifest_bytes:,} bytes, at most {MAX_JSON_BYTES:,};"
            " make larger shards (--shard-mb)"
        )


def _entry(shard: DoneShard, num_classes: int) -> ShardEntry:
    counts = np.bincount(shard.columns["label"], minlength=num_classes)
    return ShardEntry(
        file=shard.file,
        bytes=shard.bytes,
        hash=shard.hash,
        end=shard.end,
        num_samples=shard.num_samples,
        class_counts=counts.tolist(),
    )


def _joined(shards: Iterable[DoneShard], members: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The columns of the whole set."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in column_types(members)}
    key_bytes = 0
    for number, shard in enumerate(shards):
        columns = dict(shard.columns)
        columns["shard_of"] = np.full(shard.num_samples, number, COLUMNS["shard_of"])
        columns["key_end"] = columns["key_end"] + key_bytes
        key_bytes += len(columns["key_bytes"])
        for name, part in parts.items():
            part.append(columns[name])
    return {name: np.concatenate(part) for name, part in parts.items()}
