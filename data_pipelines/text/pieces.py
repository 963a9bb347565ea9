"""Documents as windows of bytes: pure arithmetic over a document's length.

A document's windows follow one another, and each but the first may repeat the end of the one before it, which it
carries along as context. A byte counts in the first window that has it, so that every byte counts once.
"""

from dataclasses import dataclass

KIND = "text"
"""The kind of source that a set of texts was written from, as its manifest says."""
PAIR_KINDS = ("moses", "tsv")
"""Those of sets of pairs, whose samples have a second member, TARGET."""
TARGET = "target"
MAX_WINDOW = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TextWindows:
    """Windows of `window` bytes, of which each but a document's first repeats `carried` bytes.

    What is read back in order, without repetition, is the document. Of pairs `window` is the most that a side may have.
    """

    window: int = 256
    carried: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window {self.window}: expected 1 to {MAX_WINDOW:,} bytes")
        if not 0 <= self.carried < self.window:
            raise ValueError(f"carried {self.carried}: expected 0 to {self.window - 1} bytes, less than the window")

    def starts(self, num_bytes: int) -> range:
        """Where the windows of a document of so many bytes begin; the last one may be shorter."""
        return range(0, max(1, num_bytes - self.carried), self.window - self.carried)

    def num_counted(self, start: int, length: int) -> int:
        """How many bytes at the end of a window were in none before it."""
        return length if start == 0 else length - self.carried
