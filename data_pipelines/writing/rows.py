"""The rows of one shard on their way into the index, and the marker that says that the shard is complete."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import parse_checked
from data_pipelines.shards.index import WORK_FOLDER, column_types
from data_pipelines.shards.npz_columns import parse_columns, render_columns
from data_pipelines.shards.packed_strings import pack_strings


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """An image that was left out, and why."""

    key: str
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DoneShard:
    """A complete shard: file and hash, where its last record ends (bytes), its rows of the index, what was left out.

    `num_turned` images are stored in another orientation than they are shown in.
    """

    file: str
    bytes: int
    hash: str
    end: int
    columns: dict[str, NDArray[Any]]
    rejected: list[Rejected]
    num_turned: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.columns["label"])


@dataclass(frozen=True)
class _Head:
    """What of a done shard is no array, as JSON in its marker."""

    file: str
    bytes: int
    hash: str
    end: int
    num_turned: int
    rejected: list[Rejected]


class RowTable:
    """Collects the rows of a shard of samples with these members. `shard_of` stays 0 until shards are joined."""

    def __init__(self, members: Iterable[str] = ()) -> None:
        self._types = column_types(members)
        self._values: dict[str, list[int]] = {name: [] for name in self._types if not name.startswith("key_")}
        self._keys: list[str] = []

    def add(self, key: str, **values: int) -> None:
        """One sample: all columns but those of the key and the shard."""
        self._keys.append(key)
        for name, column in self._values.items():
            column.append(values[name] if name != "shard_of" else 0)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The rows as arrays."""
        keys = pack_strings(self._keys)
        columns: dict[str, NDArray[Any]] = {"key_end": keys.ends, "key_bytes": keys.blob}
        for name, values in self._values.items():
            columns[name] = np.array(values, self._types[name])
        return columns


def done_path(folder: Path, index: int) -> Path:
    """The marker that says that a shard is complete."""
    return folder / WORK_FOLDER / f"done-{index:06d}.npz"


def save_done(folder: Path, index: int, done: DoneShard) -> None:
    """Writes the done-marker of a shard."""
    names = ("file", "bytes", "hash", "end", "num_turned")
    head = {name: getattr(done, name) for name in names}
    text = json.dumps({**head, "rejected": [asdict(item) for item in done.rejected]})
    columns = {"head": np.frombuffer(text.encode(), np.uint8), **done.columns}
    write_whole(done_path(folder, index), render_columns(columns))


def load_done(folder: Path, index: int) -> DoneShard:
    """The done-marker of a shard."""
    columns = parse_columns(done_path(folder, index).read_bytes())
    head = parse_checked(columns.pop("head").tobytes(), _Head, done_path(folder, index))
    return DoneShard(**vars(head), columns=columns)
