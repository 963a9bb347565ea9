"""Parquet files as Hugging Face publishes image sets: a column of image bytes and a column of labels.

    image: struct<bytes: binary, path: string>  or  binary        label: int64

The names of the files say the split (train-00000-of-00294.parquet); class names come from the metadata that the
`datasets` library writes. Only pyarrow can find an image inside its row group, so row groups are the units by which a
plan shuffles, and a reader keeps those of the shard that it is at.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.checked_files import open_regular, parse_checked
from data_pipelines.extras import install_extra
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.sources.listing import Listing, are_class_names, check_labels, numbered_class_names

# Row groups kept by a reader, in bytes: more than a shard holds.
_KEPT_BYTES = 512 * 2**20


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Parquet needs pyarrow; {install_extra('parquet')}") from None
    return pyarrow


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the file in whatever pyarrow says of it."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file or a broken one; get the file again ({error})") from error


def list_samples(folder: Path, split: str | None) -> Listing:
    """The images of the files `SPLIT-*.parquet` (all files without a split) in `folder` or its folder `data`."""
    pattern = f"{split}-*.parquet" if split else "*.parquet"
    paths = sorted(folder.glob(pattern)) or sorted((folder / "data").glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {pattern} in it or in its folder data")
    files = [_open(path) for path in paths]
    labels = [_labels(path, file) for path, file in zip(paths, files, strict=True)]
    counts = [len(part) for part in labels]
    label = np.concatenate(labels)
    if not len(label):
        raise ValueError(f"{folder}: no images in its Parquet files")
    class_names = _class_names(paths, files) or numbered_class_names(int(label.max()), folder)
    for path, part in zip(paths, labels, strict=True):
        check_labels(part, class_names, path)
    # The size of an image is known only after reading it: the mean of its file is good enough to cut shards by.
    mean_bytes = [
        sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)) // max(count, 1)
        for file, count in zip(files, counts, strict=True)
    ]
    # Row groups are numbered through all files.
    group_sizes = [size for file in files for size in _group_sizes(file)]
    rows = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    path_of = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
    stems = [path.stem.replace(".", "_") for path in paths]
    pairs = list(zip(path_of.tolist(), rows.tolist(), strict=True))
    return Listing(
        class_names=class_names,
        paths=pack_strings(str(path.resolve()) for path in paths),
        path_of=path_of,
        offset=rows,
        length=np.repeat(np.array(mean_bytes, np.int64), counts),
        label=label,
        keys=pack_strings(f"{stems[number]}-{row:06d}" for number, row in pairs),
        names=pack_strings(f"{paths[number].name}[{row}]" for number, row in pairs),
        unit_of=np.repeat(np.arange(len(group_sizes), dtype=np.int32), group_sizes),
    )


class ParquetReader:
    """Images of Parquet files: `offset` is the row, `length` is not used."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}
        self._starts: dict[str, Any] = {}
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._kept_bytes = 0

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._files:
            file = self._files[path] = _open(Path(path))
            self._starts[path] = np.cumsum([0, *_group_sizes(file)])
        starts = self._starts[path]
        group = int(np.searchsorted(starts, offset, side="right")) - 1
        value = self._images(path, group)[offset - int(starts[group])].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        # An absent image is a bad one, which the header check reports as an empty file.
        return value or b""

    def _images(self, path: str, group: int) -> Any:
        place = (path, group)
        if place not in self._groups:
            with _reading(Path(path)):
                images = self._files[path].read_row_group(group, columns=["image"]).column("image")
            self._kept_bytes += images.nbytes
            while self._groups and self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups[place] = images
        self._groups.move_to_end(place)
        return self._groups[place]


def _open(path: Path) -> Any:
    # Closed again: pyarrow reads a path faster than a file of Python's.
    open_regular(path).close()
    with _reading(path):
        file = _pyarrow().parquet.ParquetFile(path)
        schema = file.schema_arrow
    for name in ("image", "label"):
        if schema.names.count(name) != 1:
            raise ValueError(f"{path}: expected the columns image and label, got {', '.join(schema.names)}")
    types = _pyarrow().types
    image = schema.field("image").type
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = image.field("bytes").type
    if str(image) not in ("binary", "large_binary"):
        raise ValueError(f"{path}: column image: expected bytes, or a struct with a field bytes of these, got {image}")
    label = schema.field("label").type
    if not types.is_integer(label):
        raise ValueError(f"{path}: column label: expected whole numbers, got {label}; write class numbers there")
    # Runs of equal values take no room in a file: without this a small one could list more rows than memory holds.
    if file.metadata.num_rows > path.stat().st_size:
        raise ValueError(f"{path}: {file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes, so without images")
    return file


def _group_sizes(file: Any) -> list[int]:
    """Images in each row group."""
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _labels(path: Path, file: Any) -> Any:
    with _reading(path):
        column = file.read(columns=["label"]).column("label")
    if column.null_count:
        row = int(column.is_null().to_numpy().argmax())
        raise ValueError(
            f"{path}: row {row} and {column.null_count - 1} more have no label; remove them or name another split"
        )
    values = column.to_numpy()
    bad = np.flatnonzero((values < 0) | (values >= 1 << 31))
    if len(bad):
        raise ValueError(f"{path}: label {values[bad[0]]} in row {bad[0]}, expected a whole number from 0 below 2^31")
    return values.astype(np.int32)


def _class_names(paths: Sequence[Path], files: Sequence[Any]) -> list[str] | None:
    """The names in the metadata of the `datasets` library, if there are any. ValueError unless all files agree."""
    first, *others = (_class_names_of(path, file) for path, file in zip(paths, files, strict=True))
    for path, names in zip(paths[1:], others, strict=True):
        if names != first:
            one, other = next(pair for pair in zip_longest(first or [], names or []) if pair[0] != pair[1])
            raise ValueError(
                f"{path}: names a class {other!r} that is {one!r} in {paths[0].name}; files of one set must agree"
            )
    return first


def _class_names_of(path: Path, file: Any) -> list[str] | None:
    text = (file.schema_arrow.metadata or {}).get(b"huggingface")
    names: Any = parse_checked(text, object, f"{path}: metadata of the datasets library") if text else None
    for key in ("info", "features", "label", "names"):
        names = names.get(key) if isinstance(names, dict) else None
    if names is not None and not are_class_names(names):
        raise ValueError(f"{path}: metadata of the datasets library with class names that are empty, twice or no text")
    return names
