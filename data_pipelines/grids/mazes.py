"""Mazes: which places does the source reach, and by which way does it reach the target?

A maze of S x S pixels has cells at odd rows and columns and passages between them. Randomised depth-first search makes
a tree of them (`gen_dfs` of maze-dataset, Ivanitskiy et al. 2023, arXiv 2309.10498). A place is row * S + column. Red
marks what is free, green the source, blue the target.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.map_png import IGNORED
from data_pipelines.keyed_random import KeyedDraws

UNREACHED = 65535
"""The distance of what the source does not reach."""
MARGIN = 3
"""Pixels that are the same in both twins around the target, by the larger of rows and columns."""
_MOST_MAZES = 1000
# Image, label map and attributes of a puzzle by member, without their ending.
Pixels = dict[str, NDArray[np.generic]]


def reach(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """A maze with one passage closed. Label 1 is reached from the source, 0 is cut off."""
    free, source = _maze(side, braid, draws), _cell(side, draws)
    before = _spread(free, side, source)[1]
    free[draws.choice([place for place in range(side * side) if free[place] and _is_passage(place, side)])] = 0
    after = _spread(free, side, source)[1]
    labels = [IGNORED if place == source or not free[place] else far < UNREACHED for place, far in enumerate(after)]
    return [_pixels(side, free, source, None, labels, distance=after, before=before)]


def path(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """Label 1 is on a shortest way from the source to the target, 0 is not."""
    free, source = _maze(side, braid, draws), _cell(side, draws)
    order, far, _ = _spread(free, side, source)
    target = draws.choice([place for place in order[1:] if not _is_passage(place, side)])
    back = _spread(free, side, target)[1]
    labels = [far[place] + back[place] == far[target] if free[place] else IGNORED for place in range(side * side)]
    return [_pixels(side, free, source, target, labels, distance=far)]


def twins(side: int, braid: float, draws: KeyedDraws) -> list[Pixels]:
    """A pair with the same maze, source and target, where alone something is asked: is it reached?

    The first has a passage closed on the way to the target, the second one off it. Both lie further than `MARGIN` from
    the target, and their distances from it and the numbers of places that they cut off differ by a quarter at most. So
    what tells the twins apart is not near the target, and the closed passage alone does not tell which twin it is.
    """
    for _ in range(_MOST_MAZES):
        free, source = _maze(side, braid, draws), _cell(side, draws)
        order, far, before = _spread(free, side, source)
        cells = [place for place in order[1:] if not _is_passage(place, side)]
        wanted = draws.choice(sorted({far[place] for place in cells}))
        target = draws.choice([place for place in cells if far[place] == wanted])
        cuts = _cuts(free, side, order, before)
        closed = _alike(
            [p for p in order if cuts[p] and _is_passage(p, side)], cuts, before, side, source, target, draws
        )
        pair = []
        for label, passage in enumerate(closed):
            free[passage] = 0
            labels = [label if place == target else IGNORED for place in range(side * side)]
            after = _spread(free, side, source)[1]
            pair.append(_pixels(side, free, source, target, labels, distance=after, before=far))
            free[passage] = 1
        if pair:
            return pair
    raise ValueError(
        f"no twins in {_MOST_MAZES:,} mazes of {side} pixels with braid {braid:g}: use a larger size or a smaller braid"
    )


PUZZLES: dict[str, Callable[[int, float, KeyedDraws], list[Pixels]]] = {"reach": reach, "twins": twins, "path": path}


def _maze(side: int, braid: float, draws: KeyedDraws) -> bytearray:
    """1 for each free place of a maze, 0 for walls. A share of `braid` of the dead ends gets a second way out.

    There is a row of walls more than the maze has, so that two steps from a cell never lead out of the array: beyond a
    border lies another one, and before its beginning its end.
    """
    free, entered = bytearray(side * (side + 1)), bytearray(side * (side + 1))
    for place in range(side):
        entered[place] = entered[place * side] = entered[place * side + side - 1] = 1
    entered[(side - 1) * side :] = bytes([1]) * (2 * side)
    steps = (-side, side, -1, 1)
    stack = [_cell(side, draws)]
    free[stack[0]] = entered[stack[0]] = 1
    while stack:
        place = stack[-1]
        ways = [step for step in steps if not entered[place + 2 * step]]
        if not ways:
            stack.pop()
            continue
        step = draws.choice(ways)
        free[place + step] = free[place + 2 * step] = entered[place + 2 * step] = 1
        stack.append(place + 2 * step)
    for place in [row * side + column for row in range(1, side, 2) for column in range(1, side, 2)] if braid else ():
        walls = [step for step in steps if not free[place + step]]
        if len(walls) == 3 and draws.below(1 << 30) < braid * (1 << 30):
            free[place + draws.choice([step for step in walls if free[place + 2 * step]])] = 1
    return free


def _cell(side: int, draws: KeyedDraws) -> int:
    return (2 * draws.below(side // 2) + 1) * side + 2 * draws.below(side // 2) + 1


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


def _cuts(free: bytearray, side: int, order: list[int], before: list[int]) -> list[int]:
    """How many places closing each place cuts off from the source, if it is a passage; 0 where there is a way round.

    A place is the only way to all that was reached over it unless an edge between two places, neither of them reached
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
    return [0 if loop else size for size, loop in zip(sizes, loops, strict=True)]


def _alike(
    passages: list[int], cuts: list[int], before: list[int], side: int, source: int, target: int, draws: KeyedDraws
) -> tuple[int, ...]:
    """A passage on the way to the target and one off it, which are to be closed in twins; nothing if none fit."""

    def apart(place: int, other: int) -> int:
        return max(abs(place // side - other // side), abs(place % side - other % side))

    way, place = set(), target
    while place != source:
        way.add(place)
        place = before[place]
    fit = [place for place in passages if apart(place, target) > MARGIN and apart(place, source) > 1]
    draws.shuffle(fit)
    for on, off in product([p for p in fit if p in way], [p for p in fit if p not in way]):
        numbers = ((cuts[on], cuts[off]), (apart(on, target), apart(off, target)))
        if all(4 * abs(one - other) <= max(one, other) for one, other in numbers):
            return on, off
    return ()


def _pixels(
    side: int, free: bytearray, source: int, target: int | None, labels: list[int], **attributes: list[int]
) -> Pixels:
    image = np.zeros((side * side, 3), np.uint8)
    image[:, 0] = np.frombuffer(free, np.uint8, side * side) * 255
    image[source, 1] = 255
    if target is not None:
        image[target, 2] = 255
    square = {name: np.array(values, np.uint16).reshape(side, side) for name, values in attributes.items()}
    return {"": image.reshape(side, side, 3), "map": np.array(labels, np.uint8).reshape(side, side), **square}
