"""Products along a line of pixels: each pixel is a generator of a group, and its label the product of all up to it.

The one puzzle whose need of depth is its distance: no label can be known before all pixels ahead of it are seen. In
groups that are not solvable (A5) no circuit of constant depth computes it unless TC0 is NC1 (Barrington 1989).
"""

from functools import cache

import numpy as np

from data_pipelines.grids.mazes import Pixels
from data_pipelines.keyed_random import KeyedDraws

# Generators as permutations; the first is the identity. Their colours are red, green and blue.
GROUPS = {
    "z2": ((0, 1), (1, 0)),
    "s3": ((0, 1, 2), (1, 0, 2), (1, 2, 0)),
    "a5": ((0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),
}


@cache
def group_table(group: str) -> dict[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Element -> its product with each generator g, which is i -> element[g[i]]; in the order of the labels."""
    generators = GROUPS[group]
    elements = [generators[0]]
    for element in elements:
        new = (tuple(element[i] for i in generator) for generator in generators)
        elements += [one for one in new if one not in elements]
    return {
        element: tuple(tuple(element[i] for i in generator) for generator in generators) for element in sorted(elements)
    }


def prefix_products(group: str, side: int, is_snake: bool, draws: KeyedDraws) -> Pixels:
    """Image, label map and `position` of each pixel in the line, which goes row by row, as a snake to and fro."""
    table = group_table(group)
    numbers = {element: number for number, element in enumerate(table)}
    element, labels, symbols = GROUPS[group][0], [], []
    for _ in range(side * side):
        symbols.append(draws.below(len(GROUPS[group])))
        element = table[element][symbols[-1]]
        labels.append(numbers[element])
    position = np.arange(side * side, dtype=np.uint16).reshape(side, side)
    if is_snake:
        position[1::2] = position[1::2, ::-1].copy()
    image = np.eye(3, dtype=np.uint8)[np.array(symbols)] * np.uint8(255)
    return {"": image[position], "map": np.array(labels, np.uint8)[position], "position": position}
