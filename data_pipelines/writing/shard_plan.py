"""The plan of a shard set: which image goes into which shard, decided before the first one is written.

    listing -> shuffled by the seed -> cut into shards of equal bytes or counts -> TARGET/.writing/plan.npz

A plan depends on the listing and the arguments only. Any number of workers on any number of nodes can write its shards,
in any order and again after a crash, and the bytes are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import parse_checked
from data_pipelines.keyed_random import keyed_permutation, keyed_words
from data_pipelines.shards.npz_columns import parse_columns, render_columns
from data_pipelines.shards.packed_strings import PackedStrings, pack_strings
from data_pipelines.shards.tar_write import BLOCK
from data_pipelines.sources.listing import Listing

PLAN_NAME = "plan.npz"

# Headers and small members of a sample beside its image: three headers, label, metadata.
_RECORD_OVERHEAD_BYTES = 5 * BLOCK

# The columns of a listing that are arrays of one value an image; the last ones not every source has.
_ARRAYS = ("path_of", "offset", "length", "label", "metadata_offset", "metadata_length", "unit_of")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """`listing` is in the order of the shards; shard s holds its images `starts[s]` to `starts[s + 1]`.

    `arguments` are what `write` was called with; a plan is continued only with the same ones.
    """

    listing: Listing
    starts: NDArray[np.int64]
    arguments: Mapping[str, Any]

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class _Head:
    """What of a plan is no array, as JSON in the file."""

    class_names: list[str]
    arguments: dict[str, Any]
    members: list[str] = field(default_factory=list)


def make_plan(
    listing: Listing, arguments: Mapping[str, Any], *, seed: int | None, shard_bytes: int, shard_samples: int | None
) -> Plan:
    """The plan of `listing`, shuffled by `seed` (None keeps the order of the source).

    Shards have equal counts of at most `shard_samples` images if that is given, else equal bytes of about
    `shard_bytes` or less (by the sizes in the source). A source that is read by units is shuffled by these, and then
    inside each shard: so U units in S shards are read at most U + S times, not once for almost every image.
    """
    _check_keys(listing)
    if seed is None:
        starts = _cut(listing.length, shard_bytes, shard_samples)
        return Plan(listing=listing, starts=starts, arguments=dict(arguments))
    # By the content of the listing, so that two splits of one length are not shuffled alike.
    key = ("write", seed, listing_digest(listing))
    if listing.unit_of is None:
        order = keyed_permutation(len(listing), *key)
        starts = _cut(listing.length[order], shard_bytes, shard_samples)
    else:
        rank = keyed_permutation(int(listing.unit_of.max()) + 1, *key, "units")
        order = np.argsort(rank[listing.unit_of], kind="stable")
        starts = _cut(listing.length[order], shard_bytes, shard_samples)
        shard_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        order = order[np.lexsort((keyed_words(len(order), *key), shard_of))]
    return Plan(listing=_reordered(listing, order), starts=starts, arguments=dict(arguments))


def _cut(length: NDArray[np.int64], shard_bytes: int, shard_samples: int | None) -> NDArray[np.int64]:
    """Where shards begin, and at last where the last one ends, for images of these bytes."""
    num_samples = len(length)
    if shard_samples:
        weights = np.ones(num_samples, np.int64)
        num_shards = -(-num_samples // shard_samples)
    else:
        weights = -(-length // BLOCK) * BLOCK + _RECORD_OVERHEAD_BYTES
        num_shards = -(-int(weights.sum()) // shard_bytes)
    before = np.cumsum(weights) - weights
    if num_shards <= num_samples:
        shard_of = before * num_shards // int(weights.sum())
    else:
        # Images are larger than shards should be; and the product above could overflow.
        shard_of = before // shard_bytes
    return np.concatenate([[0], np.flatnonzero(np.diff(shard_of)) + 1, [num_samples]]).astype(np.int64)


def listing_digest(listing: Listing) -> str:
    """Hex SHA-256 of keys, labels, sizes and class names: where the files lie does not matter."""
    digest = hashlib.sha256(json.dumps(listing.class_names).encode())
    for array in (listing.keys.ends, listing.keys.blob, listing.label, listing.length):
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def save_plan(plan: Plan, work_folder: Path) -> None:
    """Writes the plan, complete or not at all."""
    listing = plan.listing
    head = {"class_names": listing.class_names, "arguments": plan.arguments, "members": list(listing.members)}
    columns: dict[str, NDArray[Any]] = {
        "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
        "starts": plan.starts,
        **{name: getattr(listing, name) for name in _ARRAYS if getattr(listing, name) is not None},
    }
    for name in ("paths", "keys", "names"):
        packed: PackedStrings = getattr(listing, name)
        columns[f"{name}_ends"], columns[f"{name}_blob"] = packed.ends, packed.blob
    write_whole(work_folder / PLAN_NAME, render_columns(columns))


def load_plan(work_folder: Path) -> Plan:
    """The saved plan."""
    columns = parse_columns((work_folder / PLAN_NAME).read_bytes())
    head = parse_checked(columns["head"].tobytes(), _Head, work_folder / PLAN_NAME)
    parts: dict[str, Any] = {
        name: PackedStrings(columns[f"{name}_ends"], columns[f"{name}_blob"]) for name in ("paths", "keys", "names")
    }
    parts |= {name: columns.get(name) for name in _ARRAYS}
    listing = Listing(class_names=head.class_names, members=head.members, **parts)
    return Plan(listing=listing, starts=columns["starts"], arguments=head.arguments)


def _check_keys(listing: Listing) -> None:
    """Raises ValueError when two images have one key: readers that go by keys would lose one of them."""
    if len(set(listing.keys)) == len(listing):
        return
    first: dict[str, int] = {}
    for row, key in enumerate(listing.keys):
        if key in first:
            raise ValueError(
                f"{listing.names[first[key]]!r} and {listing.names[row]!r} have the same key {key!r};"
                " rename one of them, or remove one if they are the same image"
            )
        first[key] = row


def _reordered(listing: Listing, order: NDArray[np.int64]) -> Listing:
    arrays = {name: getattr(listing, name) for name in _ARRAYS}
    parts: dict[str, Any] = {name: array[order] for name, array in arrays.items() if array is not None}
    for name in ("keys", "names"):
        texts = list(getattr(listing, name))
        parts[name] = pack_strings(texts[index] for index in order.tolist())
    return replace(listing, **parts)
