"""What the pairs of `reach.py` allow: two lines that no training can move, to be drawn beside those of models.

    python experiments/reach_oracle.py docs/results/reach_oracle.csv --test 39 --pairs 100

*Cone*: whoever sees just the pixels that n applications can bring to the target, and searches them breadth-first. It is
sure of "reached" once the way to the source lies in them, of "cut off" once all that is joined to the target does, and
knows nothing before. No model of these windows can know more of a maze by itself; what it guesses is another matter.
*Flood*: the fastest way to spread along corridors in these windows. In each application all that is joined within a
window learns whether any of it is reached. A block that did this without a mistake would be on this line.

What is written down before: the cone has all of a maze of 39 pixels after 30 applications, so a need for more of them
is of the way in which one can compute it, and not of what can be seen.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from reach import COUNTS, MODEL, STEPS, reach, test_pairs

from sret_scale.model.windows import WindowOrder

DENSE = sorted({*range(2, 31, 2), *range(40, 300, 20), *COUNTS})


def windows(side: int) -> np.ndarray:
    """(2, side, side) the window of each pixel in even applications, and in odd ones."""
    order = WindowOrder(side, MODEL.stages[0].window)
    found = np.empty((2, order.side**2), int)
    for number, pixels in enumerate(order.orders.numpy()):
        found[number, pixels] = np.arange(order.side**2) // order.window**2
    return found.reshape(2, order.side, order.side)[:, :side, :side]


def joined(free: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(side, side) int: the same number for free pixels with a way between them that stays within one of `inside`."""
    number = np.full(free.shape, -1)
    for start in map(tuple, np.argwhere(free)):
        if number[start] < 0:
            number[start], stack = start[0] * free.shape[1] + start[1], [start]
            while stack:
                row, column = stack.pop()
                for a, b in STEPS:
                    place = row + a, column + b
                    if free[place] and number[place] < 0 and inside[place] == inside[row, column]:
                        number[place] = number[start]
                        stack.append(place)
    return number


def spread(groups: np.ndarray, known: np.ndarray) -> np.ndarray:
    """All pixels in a group of which any is known; no group is -1."""
    hit = np.zeros(groups.max() + 2, bool)
    hit[groups[known]] = True
    hit[-1] = False
    return hit[groups]


def cone(target: tuple[int, int], count: int, cut: np.ndarray) -> np.ndarray:
    """(side, side) bool: the pixels from which `count` applications bring something to the target."""
    seen = np.zeros(cut.shape[1:], bool)
    seen[target] = True
    for application in reversed(range(count)):
        seen = spread(cut[application % 2], seen)
    return seen


def belief(free: np.ndarray, source: tuple[int, int], target: tuple[int, int], seen: np.ndarray) -> int:
    """1 if the target is reached by what is seen, -1 if it is cut off, 0 if that cannot be told."""
    group = joined(free & seen, np.zeros_like(seen))
    mine = group == group[target]
    if mine[source]:
        return 1
    beside = np.zeros_like(seen)
    for a, b in STEPS:
        beside |= np.roll(mine, (a, b), (0, 1))
    return 0 if (beside & ~seen).any() else -1


def flooded(free: np.ndarray, source: tuple[int, int], target: tuple[int, int], cut: np.ndarray, most: int) -> int:
    """After how many applications the target can have learned that it is reached; `most` + 1 if it never does."""
    groups, known = [joined(free, inside) for inside in cut], np.zeros(free.shape, bool)
    known[source] = True
    for count in range(most):
        known = spread(groups[count % 2], known)
        if known[target]:
            return count + 1
    return most + 1


def rows(side: int, pairs: int, braid: float) -> Iterator[dict[str, object]]:
    """A line of the table for each oracle and number of applications."""
    cut = windows(side)
    made = list(test_pairs(side, pairs, braid, set()).values())
    # Closed on the way first; red are free pixels, green is the source.
    mazes = [[(image[0] + image[1] > 0, tuple(np.argwhere(image[1])[0])) for image in images] for images, _, _ in made]
    front = [flooded(*maze[1], target, cut, max(DENSE)) for maze, (_, target, _) in zip(mazes, made, strict=True)]
    for count in DENSE:
        told: dict[str, list[float]] = {"cone": [], "flood": [0.5 + (count >= one) / 2 for one in front]}
        for maze, (_, target, _) in zip(mazes, made, strict=True):
            closed, kept = (belief(free, source, target, cone(target, min(count, 60), cut)) for free, source in maze)
            told["cone"].append((1 + np.sign(kept - closed)) / 2)
        for name, values in told.items():
            ours = sorted((pair[2], value, value) for pair, value in zip(made, values, strict=True))
            share = round(float(np.mean(values)), 4)
            yield {
                "oracle": name, "side": side, "braid": braid, "applications": count, "pairs": len(ours),
                "told_apart": share, "reach": reach(ours),
            }  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--test", type=int, nargs="*", default=[39])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--braid", type=float, nargs="*", default=[0.0])
    args = parser.parse_args()
    lines = [line for side in args.test for braid in args.braid for line in rows(side, args.pairs, braid)]
    with args.table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        writer.writerows(lines)
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
