"""The listing of a source: every image's place, key and label, before any image is read.

A listing is what a plan is made of. It names files and offsets only, so that worker processes and other nodes can read
the same bytes from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipelines.checked_files import read_bounded
from data_pipelines.shards.manifest import read_manifest
from data_pipelines.shards.packed_strings import PackedStrings

MAX_UNNAMED_CLASSES = 1 << 16
CLASSES_FILE = "classes.txt"


class ListedImage(NamedTuple):
    """One row of a listing, in plain values."""

    path: str
    offset: int
    length: int
    label: int
    key: str
    name: str
    metadata_offset: int
    metadata_length: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """N images. Image i is `length[i]` bytes at `offset[i]` of the file `paths[path_of[i]]` (for the kind's reader).

    `keys` are unique and fit for a tar; `names` say where an image comes from, for people. A source that has metadata
    of its own says where in the same file it lies; length 0 is none. `unit_of`, where there is one, numbers what can
    only be read as a whole: a row group of a Parquet file. `members`: the endings of what each sample has beside image,
    label and metadata (its label map).
    """

    class_names: list[str]
    paths: PackedStrings
    path_of: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int32]
    keys: PackedStrings
    names: PackedStrings
    metadata_offset: NDArray[np.int64] | None = None
    metadata_length: NDArray[np.int64] | None = None
    unit_of: NDArray[np.int32] | None = None
    members: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.offset)

    def images(self, start: int, stop: int) -> Iterator[ListedImage]:
        """Images `start` to before `stop`."""
        none = [0] * (stop - start)
        places = (None if part is None else part[start:stop] for part in (self.metadata_offset, self.metadata_length))
        columns = (
            (self.paths[number] for number in self.path_of[start:stop].tolist()),
            *(part[start:stop].tolist() for part in (self.offset, self.length, self.label)),
            self.keys.part(start, stop),
            self.names.part(start, stop),
            *(none if place is None else place.tolist() for place in places),
        )
        return map(ListedImage, *columns)


class Reader(Protocol):
    """Reads the bytes of images that a listing names."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        """The image file's bytes; those of a member of it for `member_path` and `WHOLE`, none where it has none."""


def check_labels(label: NDArray[np.int32], class_names: Sequence[str], where: Path) -> None:
    """Raises ValueError when a label is not an index into the classes."""
    bad = np.flatnonzero((label < 0) | (label >= len(class_names)))
    if len(bad):
        raise ValueError(
            f"{where}: label {int(label[bad[0]])} of image {int(bad[0])} is outside the {len(class_names)} classes"
            f" ({len(bad)} such labels); correct the labels or the list of classes"
        )


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line. Raises ValueError for an empty or repeated name."""
    try:
        names = [line.strip() for line in read_bounded(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected class names as text in UTF-8 ({error.reason}); save it as that") from error
    if not are_class_names(names):
        raise ValueError(f"{path}: expected one class name a line, none empty and none twice")
    return names


def class_names_from(path: Path) -> tuple[str, ...]:
    """The class names of a shard folder, or of a text file. Raises ValueError or OSError."""
    return tuple(read_manifest(path).class_names if path.is_dir() else read_class_names(path))


def are_class_names(names: object) -> bool:
    """Whether this is a list of names, at least one, none empty and none twice."""
    return (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
    )


def numbered_class_names(largest: int, where: Path) -> list[str]:
    """Names for classes without: their numbers, up to the `largest` label. ValueError for one that is no class."""
    if largest >= MAX_UNNAMED_CLASSES:
        raise ValueError(
            f"{where}: a label of {largest:,}, expected less than {MAX_UNNAMED_CLASSES:,} where nothing names the"
            " classes; correct the labels, or give a list of classes"
        )
    return [str(index) for index in range(largest + 1)]
