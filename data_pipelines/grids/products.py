"""Products along a line of pixels: each pixel is a generator of a group, and its label the product of all up to it.

The puzzle whose need of depth is its distance: no label is known before all pixels ahead of it are seen. For groups
that are not solvable (A5) it is complete for NC1 (Barrington 1989).
"""

from functools import cache

import numpy as np

from data_pipelines.grids.mazes import Pixels
from data_pipelines.keyed_random import KeyedDraws

Element = tuple[int, ...]
# Generators as permutations; the first is the identity. Their colours are red, green and blue.
GROUPS: dict[str, tuple[Element, ...]] = {
    "z2": ((0, 1), (1, 0)),
    "s3": ((0, 1, 2), (1, 0, 2), (1, 2, 0)),
    "a5": ((0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),
}


@cache
def group_table(group: str) -> dict[Element, list[Element]]:
    """Element -> its product with each generator g, i -> element[g[i]]; in the order of the labels."""
    table, elements = {}, [GROUPS[group][0]]
    for element in elements:
        table[element] = [tuple(element[i] for i in generator) for generator in GROUPS[group]]
        elements += [one for one in table[element] if one not in elements]
    return dict(sorted(table.items()))


def prefix_products(group: str, side: int, is_snake: bool, draws: KeyedDraws) -> Pixels:
    """Image, label map and `position` of each pixel in the line, which goes row by row, as a snake to and fro."""
    table = group_table(group)
    numbers, element = {element: number for number, element in enumerate(table)}, GROUPS[group][0]
    symbols = [draws.below(len(GROUPS[group])) for _ in range(side * side)]
    labels = [numbers[element := table[element][symbol]] for symbol in symbols]
    position = np.arange(side * side, dtype=np.uint16).reshape(side, side)
    if is_snake:
        position[1::2] = position[1::2, ::-1].copy()
    image = np.eye(3, dtype=np.uint8)[symbols] * np.uint8(255)
    return {"": image[position], "map": np.array(labels, np.uint8)[position], "position": position}
