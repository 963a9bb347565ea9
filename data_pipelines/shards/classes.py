"""Class names: what makes a list of them, and two sets whose labels are to mean the same."""

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shards.index import ShardSet


def check_same_classes(got: Sequence[str], expected: Sequence[str], *, where: str, owner: str) -> None:
    """Raise ValueError, naming the first difference, unless the classes at `where` are those of `owner`, in order."""
    for index, (one, other) in enumerate(zip_longest(got, expected)):
        if one != other:
            raise ValueError(f"{where}: other classes than {owner}: class {index}: expected {other!r}, got {one!r}")


def renumbered(shards: ShardSet, class_names: Sequence[str], owner: str) -> ShardSet:
    """`shards` with the labels of `class_names`, those of `owner`: found by name, so that a set may lack classes.

    Raises ValueError for a class that is not among them.
    """
    if shards.class_names == list(class_names):
        return shards
    if shards.members:
        # Their labels are in pixels.
        check_same_classes(shards.class_names, class_names, where=str(shards.folder), owner=owner)
    numbers = numbers_of(shards.class_names, class_names, str(shards.folder), owner)
    manifest = dataclasses.replace(shards.manifest, class_names=list(class_names))
    return dataclasses.replace(shards, label=numbers[shards.label], manifest=manifest)


def numbers_of(got: Sequence[str], class_names: Sequence[str], where: str, owner: str) -> NDArray[np.int32]:
    """The number in `class_names`, those of `owner`, of each class at `where`. ValueError for one that is not there."""
    number = {name: index for index, name in enumerate(class_names)}
    if not number.keys() >= set(got):
        if len(got) != len(class_names):
            index = next(index for index, name in enumerate(got) if name not in number)
            raise ValueError(
                f"{where}: other classes than {owner}: {len(got)}, expected the {len(class_names)} there or"
                f" some of them; class {index}, {got[index]!r}, is none of these"
            )
        check_same_classes(got, class_names, where=where, owner=owner)
    return np.array([number[name] for name in got], np.int32)


def classes_without_samples(shards: ShardSet) -> list[str]:
    """The names of classes that no sample of the set has; none where labels are in pixels, which nobody counts."""
    if shards.members:
        return []
    counts = np.bincount(shards.label, minlength=shards.num_classes)
    return [name for name, count in zip(shards.class_names, counts, strict=True) if not count]


def describe_missing(names: Sequence[str], folder: object) -> str:
    """A sentence about the classes that a set has no sample of."""
    shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    return f"{folder} has no sample of {len(names):,} {'class' if len(names) == 1 else 'classes'}: {shown}"
