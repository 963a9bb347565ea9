"""Mazes: which places does the source reach, and by which way does it reach the target?

A maze of S x S pixels has cells at odd rows and columns and passages between them. Randomised depth-first search makes
a tree of them (`gen_dfs` of maze-dataset, Ivanitskiy et al. 2023, arXiv 2309.10498). A place is row * S + column. Red
marks what is free, green the source, blue the target.
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.map_png import IGNORED
from data_pipelines.keyed_random import KeyedDraws

UNREACHED = 65535
"""The distance of walls, and of what the source does not reach."""
MARGIN = 3
"""Twins are the same within so many rows and columns of the target."""
_MOST_MAZES = 1000
# Image (""), label map and attributes of a sample.
Pixels = dict[str, NDArray[np.generic]]


def reach(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """A maze with one passage closed. Label 1 is reached from the source, 0 is cut off."""
    free, source = _maze(side, braid, draws), draws.choice(_cells(side))
    before = _spread(free, side, source)[1]
    free[draws.choice([place for place in range(side * side) if free[place] and _is_passage(place, side)])] = 0
    after = _spread(free, side, source)[1]
    labels = [IGNORED if place == source or not free[place] else far < UNREACHED for place, far in enumerate(after)]
    return [_pixels(side, free, source, labels, distance=after, before=before)]


def path(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """Label 1 is on a shortest way from the source to the target, 0 is not."""
    free, source = _maze(side, braid, draws), draws.choice(_cells(side))
    target = draws.choice([place for place in _cells(side) if place != source])
    far, back = (_spread(free, side, place)[1] for place in (source, target))
    labels = [far[place] + back[place] == far[target] if free[place] else IGNORED for place in range(side * side)]
    return [_pixels(side, free, source, labels, target, distance=far)]


def twins(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """A pair with the same maze, source and target, where alone something is asked: is it reached?

    The first has a passage closed on the way to the target, the second one off it. Both lie further than `MARGIN` from
    the target, and their distances from it and the numbers of places that they cut off differ by a quarter at most. So
    nothing near the target tells the twins apart, nor does the closed passage by itself.
    """
    for _ in range(_MOST_MAZES):
        free, source = _maze(side, braid, draws), draws.choice(_cells(side))
        order, far, before = _spread(free, side, source)
        wanted = draws.choice(sorted({far[place] for place in _cells(side)} - {0}))
        target = draws.choice([place for place in _cells(side) if far[place] == wanted])
        if closed := _alike(side, _cuts(free, side, order, before), before, source, target, draws):
            break
    else:
        raise ValueError(f"no twins in {_MOST_MAZES:,} mazes of {side} pixels, braid {braid:g}: make larger ones")
    pair = []
    for label, passage in enumerate(closed):
        free[passage] = 0
        labels = [label if place == target else IGNORED for place in range(side * side)]
        after = _spread(free, side, source)[1]
        pair.append(_pixels(side, free, source, labels, target, distance=after, before=far))
        free[passage] = 1
    return pair


PUZZLES: dict[str, Callable[[int, float, KeyedDraws], list[Pixels]]] = {"reach": reach, "twins": twins, "path": path}


def _maze(side: int, braid: float, draws: KeyedDraws) -> bytearray:
    """1 for each free place of a maze, 0 for walls. A share of `braid` of the dead ends gets a second way out."""
    free, left, steps = bytearray(side * side), set(_cells(side)), (-side, side, -1, 1)
    stack = [draws.choice(_cells(side))]
    while stack:
        place = stack[-1]
        free[place] = 1
        left.discard(place)
        if ways := [step for step in steps if place + 2 * step in left]:
            step = draws.choice(ways)
            free[place + step] = 1
            stack.append(place + 2 * step)
        else:
            stack.pop()
    inside = set(_cells(side))
    for place in _cells(side) if braid else ():
        walls = [step for step in steps if not free[place + step]]
        if len(walls) == 3 and draws.below(1 << 30) < braid * (1 << 30):
            free[place + draws.choice([step for step in walls if place + 2 * step in inside])] = 1
    return free


@cache
def _cells(side: int) -> list[int]:
    return [row * side + column for row in range(1, side, 2) for column in range(1, side, 2)]


def _is_passage(place: int, side: int) -> bool:
    return (place // side + place % side) % 2 == 1


def _spread(free: bytearray, side: int, source: int) -> tuple[list[int], list[int], list[int]]:
    """Places in the order in which the source reaches them; of every place its distance and the place before it."""
    far, before, order = [UNREACHED] * (side * side), [-1] * (side * side), [source]
    far[source] = 0
    for place in order:
        for step in (-side, side, -1, 1):
            other = place + step
            if free[other] and far[other] == UNREACHED:
                far[other], before[other] = far[place] + 1, place
                order.append(other)
    return order, far, before


def _cuts(free: bytearray, side: int, order: list[int], before: list[int]) -> dict[int, int]:
    """Passage -> how many places closing it cuts off from the source, of those to which there is no way round.

    A passage is the only way to all that was reached over it unless an edge between two places, neither of them reached
    over the other, leads out of these. Such an edge is a bit of both its ends, and those of inner ones cancel.
    """
    sizes, loops, number = [0] * len(before), [0] * len(before), 0
    for place in order:
        for other in (place + 1, place + side):
            if free[other] and before[other] != place and before[place] != other:
                loops[place] ^= 1 << number
                loops[other] ^= 1 << number
                number += 1
    for place in reversed(order[1:]):
        sizes[before[place]] += sizes[place] + 1
        loops[before[place]] ^= loops[place]
    return {place: sizes[place] for place in order if not loops[place] and _is_passage(place, side)}


def _alike(
    side: int, cuts: dict[int, int], before: list[int], source: int, target: int, draws: KeyedDraws
) -> tuple[int, ...]:
    """A passage on the way to the target and one off it, which are to be closed in twins; nothing if none fit."""

    def apart(place: int, other: int) -> int:
        return max(abs(place // side - other // side), abs(place % side - other % side))

    way, place = set(), target
    while place != source:
        way.add(place)
        place = before[place]
    fit = [place for place in cuts if apart(place, target) > MARGIN and apart(place, source) > 1]
    fit.sort(key=lambda place: draws.below(1 << 62))
    for on, off in product([place for place in fit if place in way], [place for place in fit if place not in way]):
        numbers = ((cuts[on], cuts[off]), (apart(on, target), apart(off, target)))
        if all(4 * abs(one - other) <= max(one, other) for one, other in numbers):
            return on, off
    return ()


def _pixels(
    side: int, free: bytearray, source: int, labels: list[int], target: int | None = None, **attributes: list[int]
) -> Pixels:
    image = np.zeros((side * side, 3), np.uint8)
    image[:, 0] = np.frombuffer(free, np.uint8) * 255
    image[source, 1] = 255
    if target is not None:
        image[target, 2] = 255
    square = {name: np.array(values, np.uint16).reshape(side, side) for name, values in attributes.items()}
    return {"": image.reshape(side, side, 3), "map": np.array(labels, np.uint8).reshape(side, side), **square}
