"""The plan of a shard set: which image goes into which shard, decided before the first one is written.

    listing -> shuffled by the seed -> cut into shards of equal bytes or counts -> TARGET/.writing/plan.npz

A plan depends on the listing and the arguments only. Any number of workers on any number of nodes can write its shards,
in any order and again after a crash, and the bytes are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.columns import parse_columns, render_columns
from data_pipelines.files import replacing
from data_pipelines.keyed import keyed_permutation
from data_pipelines.sources.listing import Listing
from data_pipelines.strings import PackedStrings, pack_strings
from data_pipelines.tar.records import BLOCK

PLAN_NAME = "plan.npz"

# Headers and small members of a sample beside its image: three headers, label, metadata.
_RECORD_OVERHEAD_BYTES = 5 * BLOCK


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


def make_plan(
    listing: Listing, arguments: Mapping[str, Any], *, seed: int | None, shard_bytes: int, shard_samples: int | None
) -> Plan:
    """The plan of `listing`, shuffled by `seed` (None keeps the order of the source).

    Shards have equal counts of at most `shard_samples` images if that is given, else equal bytes of about
    `shard_bytes` or less (by the sizes in the source).
    """
    _check_keys(listing)
    num_samples = len(listing)
    if seed is not None:
        # By the content of the listing, so that two splits of one length are not shuffled alike.
        listing = _reordered(listing, keyed_permutation(num_samples, "write", seed, listing_digest(listing)))
    if shard_samples:
        weights = np.ones(num_samples, np.int64)
        num_shards = -(-num_samples // shard_samples)
    else:
        weights = -(-listing.length // BLOCK) * BLOCK + _RECORD_OVERHEAD_BYTES
        num_shards = -(-int(weights.sum()) // shard_bytes)
    before = np.cumsum(weights) - weights
    if num_shards <= num_samples:
        shard_of = before * num_shards // int(weights.sum())
    else:
        # Images are larger than shards should be; and the product above could overflow.
        shard_of = before // shard_bytes
    starts = np.concatenate([[0], np.flatnonzero(np.diff(shard_of)) + 1, [num_samples]]).astype(np.int64)
    return Plan(listing=listing, starts=starts, arguments=dict(arguments))


def listing_digest(listing: Listing) -> str:
    """Hex SHA-256 of keys, labels, sizes and class names: where the files lie does not matter."""
    digest = hashlib.sha256(json.dumps(listing.class_names).encode())
    for array in (listing.keys.ends, listing.keys.blob, listing.label, listing.length):
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def save_plan(plan: Plan, work_folder: Path) -> None:
    """Writes the plan, complete or not at all."""
    listing = plan.listing
    head = {"class_names": listing.class_names, "arguments": plan.arguments}
    columns: dict[str, NDArray[Any]] = {
        "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
        "starts": plan.starts,
        **{name: getattr(listing, name) for name in ("path_of", "offset", "length", "label")},
    }
    for name in ("paths", "keys", "names"):
        packed: PackedStrings = getattr(listing, name)
        columns[f"{name}_ends"], columns[f"{name}_blob"] = packed.ends, packed.blob
    with replacing(work_folder / PLAN_NAME) as file:
        file.write(render_columns(columns))


def load_plan(work_folder: Path) -> Plan:
    """The saved plan."""
    columns = parse_columns((work_folder / PLAN_NAME).read_bytes())
    head = json.loads(columns["head"].tobytes())
    parts: dict[str, Any] = {
        name: PackedStrings(columns[f"{name}_ends"], columns[f"{name}_blob"]) for name in ("paths", "keys", "names")
    }
    parts |= {name: columns[name] for name in ("path_of", "offset", "length", "label")}
    listing = Listing(class_names=head["class_names"], **parts)
    return Plan(listing=listing, starts=columns["starts"], arguments=head["arguments"])


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
    parts: dict[str, Any] = {name: getattr(listing, name)[order] for name in ("path_of", "offset", "length", "label")}
    for name in ("keys", "names"):
        texts = list(getattr(listing, name))
        parts[name] = pack_strings(texts[index] for index in order.tolist())
    return replace(listing, **parts)
