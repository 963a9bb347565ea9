"""Several shard sets as one, each with a weight.

Samples of all sets are numbered in a row, so that order, state, reading and quarantine work as for one set. What an
epoch takes from each set is decided in `order.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.shards.classes import check_same_classes
from data_pipelines.shards.index import MemberColumns, ShardSet
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.packed_strings import PackedStrings

_ARRAYS = ("offset", "length", "label", "crc", "width", "height", "record_offset", "frame_crc")


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedShardSet(ShardSet):
    """A shard set made of several `parts`, in this order."""

    parts: tuple[ShardSet, ...]

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Their numbers of samples."""
        return tuple(part.num_samples for part in self.parts)


def mix_shards(parts: Sequence[ShardSet]) -> MixedShardSet:
    """The sets as one. Raises ValueError unless they have the same classes."""
    first = parts[0]
    for part in parts[1:]:
        check_same_classes(part.class_names, first.class_names, where=str(part.folder), owner=str(first.folder))
        if part.manifest.members != first.manifest.members:
            names = [" ".join(one.manifest.members) or "none" for one in (first, part)]
            raise ValueError(f"{part.folder}: other members than {first.folder}: expected {names[0]}, got {names[1]}")
    first_shards = np.cumsum([0, *(part.num_shards for part in parts)])
    key_starts = np.cumsum([0, *(len(part.keys.blob) for part in parts)])
    return MixedShardSet(
        folder=first.folder,
        manifest=_manifest(parts),
        shard_of=np.concatenate(
            [part.shard_of + np.int32(start) for part, start in zip(parts, first_shards[:-1], strict=True)]
        ),
        keys=PackedStrings(
            np.concatenate([part.keys.ends + start for part, start in zip(parts, key_starts[:-1], strict=True)]),
            np.concatenate([part.keys.blob for part in parts]),
        ),
        parts=tuple(parts),
        members={
            name: MemberColumns(*map(np.concatenate, zip(*(part.members[name] for part in parts), strict=True)))
            for name in first.members
        },
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS},
    )


def _manifest(parts: Sequence[ShardSet]) -> Manifest:
    """Names the files by absolute paths, which a folder is put before without effect."""
    first = parts[0].manifest
    return Manifest(
        class_names=first.class_names,
        fingerprint=hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest(),
        index_bytes=first.index_bytes,
        index_sha256=first.index_sha256,
        shards=[
            replace(shard, file=str(Path(part.folder).absolute() / shard.file))
            for part in parts
            for shard in part.manifest.shards
        ],
        num_rejected=sum(part.manifest.num_rejected for part in parts),
        writer=first.writer,
        members=first.members,
    )
