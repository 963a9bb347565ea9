"""The table of source kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.sources import idx
from data_pipelines.sources.listing import Listing, Reader


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """How to list a source (path, split) and how to read its images."""

    description: str
    list_samples: Callable[[Path, str], Listing]
    open_reader: Callable[[], Reader]


KINDS = {
    "idx": SourceKind(
        description="folder with the four IDX files of the MNIST family",
        list_samples=idx.list_samples,
        open_reader=idx.IdxReader,
    ),
}


def source_kind(name: str) -> SourceKind:
    """The kind called `name`. Raises ValueError for another name."""
    if name not in KINDS:
        raise ValueError(f"source kind {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]
