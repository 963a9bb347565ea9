"""What mazes and products promise, found anew from their pixels by breadth-first search, one step at a time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]
Array = NDArray[Any]
WALL = UNREACHED = 65535


def distances(free_HW: Array, source: Place) -> Array:
    """Steps from the source; what it does not reach is UNREACHED."""
    found_HW = np.full(free_HW.shape, UNREACHED)
    front, steps = {source}, 0
    while front:
        for place in front:
            found_HW[place] = steps
        beside = {(row + a, column + b) for row, column in front for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))}
        front, steps = {place for place in beside if free_HW[place] and found_HW[place] == UNREACHED}, steps + 1
    return found_HW


def places(image_CHW: Array) -> tuple[Array, Place, Place | None]:
    """What is free, the source, and the target if there is one."""
    free_HW, sources, targets = image_CHW[0] == 255, np.argwhere(image_CHW[1]), np.argwhere(image_CHW[2])
    assert np.isin(image_CHW, (0, 255)).all() and len(sources) == 1 and len(targets) <= 1
    source, target = (tuple(found[0].tolist()) if len(found) else None for found in (sources, targets))
    assert source is not None and free_HW[source] and (target is None or free_HW[target])
    return free_HW, source, target


def check_shape(free_HW: Array) -> None:
    """Cells at odd places are free, walls where both numbers are even; the border is closed."""
    assert free_HW[1::2, 1::2].all() and not free_HW[::2, ::2].any()
    assert not any(side.any() for side in (free_HW[0], free_HW[-1], free_HW[:, 0], free_HW[:, -1]))


def num_edges(free_HW: Array) -> int:
    """Open passages; a tree of N cells has N - 1."""
    return int(free_HW[::2, 1::2].sum() + free_HW[1::2, ::2].sum())


def apart(one: Place, other: Place) -> int:
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def product_labels(symbols: list[int], generators: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All products as permutation matrices: of the first symbol, of the first two, ..."""
    matrices = [np.eye(len(one), dtype=int)[:, list(one)] for one in generators]
    product, found = np.eye(len(generators[0]), dtype=int), []
    for symbol in symbols:
        product = product @ matrices[symbol]
        found.append(tuple(product.argmax(0).tolist()))
    return found
