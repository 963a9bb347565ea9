"""Many short strings as two arrays, so that a million of them load in milliseconds and need no pickle."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PackedStrings:
    """A sequence of strings: `ends[i]` is where string i ends in `blob`; it starts where the one before ended.

    UTF-8; bytes of file names that are not UTF-8 survive as surrogates, as in `os.fsdecode`.
    """

    ends: NDArray[np.int64]
    blob: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"string {index} of {len(self.ends)}")
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return self.part(0, len(self))

    def part(self, start: int, stop: int) -> Iterator[str]:
        """Strings `start` to before `stop`, twenty times faster than one by one."""
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop].tolist()
        blob = self.blob[first : ends[-1]].tobytes() if ends else b""
        before = 0
        for end in ends:
            yield blob[before : end - first].decode("utf-8", "surrogateescape")
            before = end - first


def pack_strings(strings: Iterable[str]) -> PackedStrings:
    """The packed form of `strings`."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
    ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), dtype=np.int64)
    return PackedStrings(ends, np.frombuffer(b"".join(encoded), np.uint8))
