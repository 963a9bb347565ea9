"""A new shard set without the bad samples of another one, or with good copies in their place.

verify -> rows that are bad -> same key in the copy? take it, else leave it out -> write in the old order
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.hashes import hash_name_of
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_scan import scan_samples
from data_pipelines.shards.tar_write import END_OF_ARCHIVE
from data_pipelines.sources.listing import Listing
from data_pipelines.stream.processes import Progress
from data_pipelines.upkeep.verify import judge_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What a repair did: bad samples that a copy replaced, bad samples that were left out, the new manifest."""

    num_replaced: int
    num_dropped: int
    manifest: Manifest


def repair_shards(
    folder: str | Path,
    target: str | Path,
    *,
    copy: str | Path | None = None,
    shard_samples: int | None = None,
    num_workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Repair:
    """Writes the good samples of `folder` to the new set `target`, in the same order.

    Bad ones are taken from the set `copy` where it has the same key, label and image checksum. Raises ValueError when
    nothing is wrong, or when nothing is left.
    """
    shards = open_shards(folder, check_tars=False)
    if shards.is_text:
        raise ValueError(f"{folder}: text is not repaired here; write the shards again from their source")
    bad, is_damaged = _bad_rows(shards, num_workers, on_progress)
    if not is_damaged:
        raise ValueError(f"{folder}: nothing in it is wrong, so there is nothing to repair")
    spare = open_shards(copy) if copy is not None else None
    replacements = _replacements(shards, bad, spare, num_workers, on_progress) if spare is not None else {}
    dropped = np.array([row for row in bad.tolist() if row not in replacements], np.int64)
    rows = np.setdiff1d(np.arange(shards.num_samples), dropped)
    if not len(rows):
        raise ValueError(f"{folder}: all samples are bad; write the shards again from their source")
    config = WriteConfig(
        kind="tars",
        source=Path(folder),
        seed=None,
        shard_samples=shard_samples,
        options=ImageOptions(),
        hash_name=hash_name_of(shards.manifest.shards[0].hash),
    )
    manifest = write_shards(
        config,
        target,
        num_workers=num_workers,
        list_samples=lambda: _listing(shards, rows, spare, replacements),
        on_progress=on_progress,
    )
    return Repair(num_replaced=len(replacements), num_dropped=len(dropped), manifest=manifest)


def _bad_rows(
    shards: ShardSet, num_workers: int, on_progress: Callable[[Progress], None]
) -> tuple[NDArray[np.int64], bool]:
    """The bad samples, and whether anything is wrong: bytes behind the end of a tar concern no sample."""
    verdicts = judge_shards(shards, num_workers=num_workers, decode=True, on_progress=on_progress)
    rows = np.array([row for verdict in verdicts for row in verdict.bad_rows], np.int64)
    return rows, any(verdict.findings for verdict in verdicts)


def _replacements(
    shards: ShardSet,
    bad: NDArray[np.int64],
    spare: ShardSet,
    num_workers: int,
    on_progress: Callable[[Progress], None],
) -> dict[int, int]:
    """Row of a bad sample -> row of its good copy."""
    unusable = set(_bad_rows(spare, num_workers, on_progress)[0].tolist())
    wanted = {shards.key(row): row for row in bad.tolist()}
    found: dict[int, int] = {}
    for spare_row, key in enumerate(spare.keys):
        row = wanted.get(key)
        if row is None or spare_row in unusable:
            continue
        if spare.crc[spare_row] == shards.crc[row] and spare.label[spare_row] == shards.label[row]:
            found[row] = spare_row
    return found


def _listing(
    shards: ShardSet, rows: NDArray[np.int64], spare: ShardSet | None, replacements: dict[int, int]
) -> Listing:
    """The samples `rows`, those with a replacement at its place in the copy."""
    paths = [str((shards.folder / name).absolute()) for name in shards.shard_names]
    path_of, offset = shards.shard_of[rows], shards.offset[rows]
    if spare is not None:
        for place in np.flatnonzero(np.isin(rows, list(replacements))).tolist():
            spare_row = replacements[int(rows[place])]
            path_of[place] = len(paths) + int(spare.shard_of[spare_row])
            offset[place] = spare.offset[spare_row]
        paths += [str((spare.folder / name).absolute()) for name in spare.shard_names]
    keys = [shards.key(row) for row in rows.tolist()]
    sets = [(shards, row) if row not in replacements else (spare, replacements[row]) for row in rows.tolist()]
    places = np.array([_metadata_place(from_set, row) for from_set, row in sets if from_set is not None], np.int64)
    return Listing(
        class_names=shards.class_names,
        paths=pack_strings(paths),
        path_of=path_of,
        offset=offset,
        length=shards.length[rows],
        label=shards.label[rows],
        keys=pack_strings(keys),
        names=pack_strings(keys),
        metadata_offset=places[:, 0],
        metadata_length=places[:, 1],
        members=list(shards.members),
    )


def _metadata_place(shards: ShardSet, row: int) -> tuple[int, int]:
    """Offset and length of the .json member of a good sample; (0, 0) without one."""
    number = int(shards.shard_of[row])
    entry = shards.manifest.shards[number]
    is_last = row + 1 == shards.num_samples or int(shards.shard_of[row + 1]) != number
    start, end = int(shards.record_offset[row]), entry.end if is_last else int(shards.record_offset[row + 1])
    with (shards.folder / entry.file).open("rb") as file:
        record = os.pread(file.fileno(), end - start, start)
    [sample] = scan_samples(memoryview(record + END_OF_ARCHIVE))
    member = sample.members.get("json")
    return (start + member.offset, member.size) if member else (0, 0)
