"""The table of source kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_pipelines.grids.made import GridReader, list_grids
from data_pipelines.sources import folder, idx, ilsvrc, parquet, tars, texts
from data_pipelines.sources.listing import Listing, Reader
from data_pipelines.sources.ranges import FileReader, RangeReader


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """How to list a source (path, split) and how to read its images. What is made has `GridOptions` for a path,
    text a pair of path and `TextWindows`."""

    description: str
    list_samples: Callable[[Any, str | None], Listing]
    open_reader: Callable[[], Reader]


KINDS = {
    "folder": SourceKind(
        description="tree with one folder of image files a class",
        list_samples=folder.list_samples,
        open_reader=FileReader,
    ),
    "ilsvrc": SourceKind(
        description="folder with the ILSVRC 2012 tars as distributed",
        list_samples=ilsvrc.list_samples,
        open_reader=RangeReader,
    ),
    "parquet": SourceKind(
        description="folder with Parquet files of the columns image and label",
        list_samples=parquet.list_samples,
        open_reader=parquet.ParquetReader,
    ),
    "tars": SourceKind(
        description="folder of webdataset tars, to write them again",
        list_samples=tars.list_samples,
        open_reader=tars.TarReader,
    ),
    "idx": SourceKind(
        description="folder with the four IDX files of the MNIST family",
        list_samples=idx.list_samples,
        open_reader=idx.IdxReader,
    ),
    "text": SourceKind(
        description="text file, or folder of .txt files", list_samples=texts.list_windows, open_reader=RangeReader
    ),
    "mazes": SourceKind(description="mazes that are made", list_samples=list_grids, open_reader=GridReader),
    "products": SourceKind(description="products of a group, made", list_samples=list_grids, open_reader=GridReader),
}


def source_kind(name: str) -> SourceKind:
    """The kind called `name`. Raises ValueError for another name."""
    if name not in KINDS:
        raise ValueError(f"source kind {name!r}: expected one of {', '.join(sorted(KINDS))}")
    return KINDS[name]
