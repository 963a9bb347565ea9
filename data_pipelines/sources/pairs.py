"""Pairs of texts, one a line: two files of as many lines (moses), or one with a tab between source and target (tsv).

Lines end at a line feed, with or without a carriage return before it, and at nothing else. All samples are of one
class, `text`; line 17 of train.de has the key train/0000017.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_write import safe_key
from data_pipelines.sources.listing import Listing
from data_pipelines.text.pieces import KIND, TARGET, TextWindows


def list_pairs(source: tuple[Path, TextWindows], split: str | None, *, num_files: int) -> Listing:
    """The lines of FILE (tsv), or of FILE,FILE (moses). ValueError where their numbers of lines differ, or are 0."""
    place, _ = source
    if split is not None:
        raise ValueError(f"split {split!r}: pairs have none; put the lines of each split into files of their own")
    files = [Path(name) for name in str(place).split(",")]
    if len(files) != num_files or "\n" in str(place):
        expected = "one file of lines with a tab" if num_files == 1 else "two files, as in train.de,train.en"
        raise ValueError(f"{place}: expected {expected}, without commas and line feeds in their names")
    first, second = (_Lines(file) for file in (files[0], files[-1]))
    if len(first) != len(second):
        raise ValueError(
            f"{files[0]} has {len(first):,} lines and {files[1]} {len(second):,}: expected as many in both"
        )
    if not len(first):
        raise ValueError(f"{files[0]}: an empty file; give it lines")
    number = np.arange(len(first), dtype=np.int64)
    key = safe_key(os.path.splitext(files[0].name)[0])  # noqa: PTH122 (as in `folder`)
    return Listing(
        class_names=[KIND],
        # Of both files, as `ranges.member_path` makes that of a target from that of a source.
        paths=pack_strings([f"{files[0].absolute()}\n{files[1].absolute() if num_files > 1 else ''}\n.source"]),
        path_of=np.zeros(len(first), np.int32),
        offset=number,
        length=first.stops - first.starts,
        label=np.zeros(len(first), np.int32),
        keys=pack_strings(f"{key}/{one + 1:07d}" for one in number.tolist()),
        names=pack_strings(f"{files[0].name}:{one + 1}" for one in number.tolist()),
        members=[TARGET],
    )


def check_pair(source: bytes, target: bytes, most: int) -> None:
    """BadImageError for a side that is empty, longer than `most` bytes, not UTF-8, or has a mark that is no text."""
    for side, text in (("source", source), ("target", target)):
        if len(text) > most:
            raise BadImageError(f"a {side} of {len(text):,} bytes, expected at most {most:,} (--window)")
        try:
            is_empty = not text.decode().strip()
        except UnicodeDecodeError as error:
            raise BadImageError(f"a {side} that is not UTF-8 ({error.reason} at byte {error.start})") from error
        if is_empty:
            raise BadImageError(f"an empty {side}: expected a text, and in a tsv a tab between the two")
        for mark, name in ((b"\0", "a NUL"), (b"\t", "a tab"), ("\ufeff".encode(), "a byte order mark")):
            if mark in text:
                raise BadImageError(f"{name} in the {side}")


def kept_texts(place: Path, most: int) -> Iterator[str]:
    """Both sides of the pairs that `check_pair` takes, line by line."""
    files = [Path(name) for name in str(place).split(",")]
    path, reader = f"{files[0]}\n{files[1] if len(files) > 1 else ''}\n", PairReader()
    for number in range(len(_Lines(files[0]))):
        pair = [reader.read(path + ending, number, 0) for ending in (".source", ".target")]
        with contextlib.suppress(BadImageError):
            check_pair(pair[0], pair[1], most)
            yield from (side.decode() for side in pair)


class PairReader:
    """Sources and targets by the number of their line."""

    def __init__(self) -> None:
        self._lines: dict[str, _Lines] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """One side of line `offset`; `path` names both files, or one and none, and the side by its ending."""
        first, second, ending = path.split("\n")
        name = second if second and ending != ".source" else first
        if name not in self._lines:
            self._lines[name] = _Lines(Path(name))
        line = self._lines[name].line(offset)
        return line if second else line.partition(b"\t")[0 if ending == ".source" else 2]


class _Lines:
    """A file's lines, mapped into memory; line i is bytes starts[i] to stops[i]."""

    def __init__(self, file: Path) -> None:
        num_bytes = file.stat().st_size
        self._data: NDArray[np.uint8] = np.memmap(file, np.uint8, "r") if num_bytes else np.zeros(0, np.uint8)
        ends = np.flatnonzero(self._data == ord("\n"))
        if num_bytes and self._data[-1] != ord("\n"):
            ends = np.append(ends, num_bytes)
        self.starts = np.concatenate([ends[:0], [0], ends[:-1] + 1])[: len(ends)]
        has_return = (ends > self.starts) & (self._data[np.maximum(ends - 1, 0)] == ord("\r"))
        self.stops = ends - has_return

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, number: int) -> bytes:
        return self._data[self.starts[number] : self.stops[number]].tobytes()
