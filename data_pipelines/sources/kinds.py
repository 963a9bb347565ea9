"""The table of source kinds."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from data_pipelines.grids.made import GridReader, list_grids
from data_pipelines.sources import folder, idx, ilsvrc, pairs, parquet, tars, texts
from data_pipelines.sources.listing import Listing, Reader
from data_pipelines.sources.ranges import FileReader, RangeReader


class SourceKind(NamedTuple):
    """How to list a source (path, split) and how to read its images. What is made has `GridOptions` for a path,
    text a pair of path and `TextWindows`."""

    list_samples: Callable[[Any, str | None], Listing]
    open_reader: Callable[[], Reader]


KINDS = {
    "folder": SourceKind(folder.list_samples, FileReader),
    "ilsvrc": SourceKind(ilsvrc.list_samples, RangeReader),
    "parquet": SourceKind(parquet.list_samples, parquet.ParquetReader),
    "tars": SourceKind(tars.list_samples, tars.TarReader),
    "idx": SourceKind(idx.list_samples, idx.IdxReader),
    "text": SourceKind(texts.list_windows, RangeReader),
    "moses": SourceKind(partial(pairs.list_pairs, num_files=2), pairs.PairReader),
    "tsv": SourceKind(partial(pairs.list_pairs, num_files=1), pairs.PairReader),
    "mazes": SourceKind(list_grids, GridReader),
    "products": SourceKind(list_grids, GridReader),
}


def source_kind(name: str) -> SourceKind:
    """The kind called `name`. Raises ValueError for another name."""
    if name not in KINDS:
        raise ValueError(f"source kind {name!r}: expected one of {', '.join(sorted(KINDS))}")
    return KINDS[name]
