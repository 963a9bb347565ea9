"""Text files, each a document, cut into windows of bytes: a folder of .txt files, or one file.

Bytes are taken as they are: no encoding is asked for and no line is changed, so texts in UTF-8 and in anything else go.
All samples are of one class, `text`.
"""

import os
from pathlib import Path

import numpy as np

from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_write import safe_key
from data_pipelines.sources.listing import Listing
from data_pipelines.text.pieces import KIND, TextWindows


def list_windows(source: tuple[Path, TextWindows], split: str | None) -> Listing:
    """The windows of all documents, file by file in the order of their names; their keys are FILE/NUMBER.

    Raises ValueError for an empty file, and for a window that no document fills.
    """
    place, windows = source
    if split is not None:
        raise ValueError(f"split {split!r}: texts have none; put the files of each split into a folder of their own")
    files = _files(place)
    sizes = [file.stat().st_size for file in files]
    if 0 in sizes:
        raise ValueError(f"{files[sizes.index(0)]}: an empty file; remove it, or give it its text")
    if windows.window > max(sizes):
        raise ValueError(
            f"{place}: expected a text of at least one window of {windows.window:,} bytes, got {max(sizes):,} in the "
            "longest: choose a smaller --window, or join texts"
        )
    root = place if place.is_dir() else place.parent
    names = [str(file.relative_to(root)) for file in files]
    places = [(number, start) for number, size in enumerate(sizes) for start in windows.starts(size)]
    path_of, offset = (np.array(column) for column in zip(*places, strict=True))
    keys = [safe_key(os.path.splitext(name)[0]) for name in names]  # noqa: PTH122 (as in `folder`)
    step = windows.window - windows.carried
    return Listing(
        class_names=[KIND],
        paths=pack_strings(str(file.absolute()) for file in files),
        path_of=path_of.astype(np.int32),
        offset=offset.astype(np.int64),
        length=np.minimum(windows.window, np.array(sizes, np.int64)[path_of] - offset),
        label=np.zeros(len(places), np.int32),
        keys=pack_strings(f"{keys[number]}/{start // step:07d}" for number, start in places),
        names=pack_strings(f"{names[number]}[{start}:]" for number, start in places),
    )


def _files(place: Path) -> list[Path]:
    """Raises FileNotFoundError where there is no text."""
    if place.is_file():
        return [place]
    files = sorted(file for file in place.rglob("*.txt") if file.is_file() and not file.name.startswith("."))
    if not files:
        what = "no .txt files in it" if place.is_dir() else "no such file or folder"
        raise FileNotFoundError(f"{place}: {what}; name a text file, or a folder with some")
    return files
