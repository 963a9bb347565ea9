"""Randomness as a function of labels: SHAKE-128 of what a draw depends on.

No generator has a state that a resumed run would have to restore, and the words are the same for every version of numpy
and torch, on every machine.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")


def keyed_words(num_words: int, *labels: str | int) -> NDArray[np.uint64]:
    """`num_words` uniform 64-bit words that depend on the labels and nothing else."""
    message = "/".join(str(label) for label in labels).encode()
    stream = hashlib.shake_128(message).digest(8 * num_words)
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)


def keyed_uniforms(num_values: int, *labels: str | int) -> NDArray[np.float64]:
    """`num_values` floats in [0, 1) that depend on the labels and nothing else."""
    return (keyed_words(num_values, *labels) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(size: int, *labels: str | int) -> NDArray[np.int64]:
    """A uniform permutation of range(size): the indices sorted by one word each, ties by index."""
    return np.argsort(keyed_words(size, *labels), kind="stable").astype(np.int64, copy=False)


class KeyedDraws:
    """Whole numbers one after another that depend on the labels and on what was asked before."""

    def __init__(self, *labels: str | int) -> None:
        self._labels, self._parts, self._words = labels, 0, list[int]()

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1, uniform within bound / 2^64."""
        if not self._words:
            self._words = keyed_words(256, *self._labels, self._parts).tolist()
            self._parts += 1
        return self._words.pop() % bound

    def choice(self, values: Sequence[Value]) -> Value:
        """One of the values."""
        return values[self.below(len(values))]
