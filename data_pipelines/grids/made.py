"""Mazes and products as sources of shards: sample i is a function of the options and i, so nothing is read or kept.

options -> listing: sample i at "offset" i of the "file" that is the options as JSON -> GridReader -> PNG
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from data_pipelines.checked_files import parse_checked
from data_pipelines.grids.mazes import PUZZLES, Pixels
from data_pipelines.grids.products import group_table, prefix_products
from data_pipelines.image.map_png import encode_png
from data_pipelines.keyed_random import KeyedDraws
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.sources.listing import Listing

Puzzle = Literal["reach", "twins", "path", "z2", "s3", "a5"]


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What is made. The first ones of more samples are the same.

    `puzzle`: one of mazes, or the group of products. `smallest`, `largest`: pixels a side, drawn for each sample (pair
    of twins); those of mazes are odd. `braid`: the share of a maze's dead ends that get a second way out. `snake`:
    every second row of products goes back.
    """

    puzzle: Puzzle
    count: int
    smallest: int
    largest: int
    seed: int = 0
    braid: float = 0.0
    snake: bool = False

    def __post_init__(self) -> None:
        if self.puzzle not in get_args(Puzzle):
            raise ValueError(f"puzzle {self.puzzle!r}: expected one of {', '.join(get_args(Puzzle))}")
        sizes = range(5, 256, 2) if self.is_maze else range(1, 256)
        if self.smallest not in sizes or self.largest not in sizes or self.smallest > self.largest:
            kind = f"{'odd ' * self.is_maze}numbers from {sizes[0]} to 255"
            raise ValueError(f"size {self.smallest}-{self.largest}: expected {kind} for {self.puzzle}")
        if self.count < 1 or (self.puzzle == "twins" and self.count % 2):
            raise ValueError(f"count {self.count}: expected 1 or more, and an even number of twins")
        if not 0 <= self.braid <= self.is_maze or (self.is_maze and self.snake):
            raise ValueError(f"braid {self.braid:g}, snake {self.snake}: expected 0 to 1 of mazes, a snake of products")

    @property
    def is_maze(self) -> bool:
        return self.puzzle in PUZZLES


def list_grids(options: GridOptions, split: str | None = None) -> Listing:
    """The listing of what is to be made; there are no splits. Classes are those of the map's labels.

    The label of a whole sample is 0, but of twins whether the target is reached.
    """
    if options.is_maze:
        class_names = ["off the path", "on the path"] if options.puzzle == "path" else ["unreached", "reached"]
    else:
        class_names = ["".join(map(str, element)) for element in group_table(options.puzzle)]
    text, rows = json.dumps(asdict(options)), np.arange(options.count, dtype=np.int64)
    members = [f"{name}.png" for name in _two(text, 0)[0] if name]
    return Listing(
        class_names=class_names,
        paths=pack_strings([f"{text}.png"]),
        path_of=np.zeros(options.count, np.int32),
        offset=rows,
        # Of the largest size, with headers, so that shards are cut about right.
        length=np.full(options.count, (1 + len(members)) * (1024 + 2 * options.largest**2)),
        label=(rows % 2 * (options.puzzle == "twins")).astype(np.int32),
        keys=pack_strings(f"{options.puzzle}-{row:06d}" for row in range(options.count)),
        names=pack_strings(f"{options.puzzle}[{row}]" for row in range(options.count)),
        members=members,
    )


class GridReader:
    """Makes what a listing of `list_grids` names."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        text, _, member = path.removesuffix(".png").rpartition("}")
        return encode_png(_two(f"{text}}}", offset // 2)[offset % 2][member.removeprefix(".")])


@lru_cache(maxsize=1)
def _two(text: str, number: int) -> list[Pixels]:
    """Samples 2 * `number` and the next one, as twins are made together. Their members are read one after another."""
    options = parse_checked(text.encode(), GridOptions, "the options of a grid")
    draws, step, made = KeyedDraws("grid", options.seed, number), 1 + options.is_maze, list[Pixels]()
    while len(made) < 2:
        side = draws.choice(range(options.smallest, options.largest + 1, step))
        if options.is_maze:
            made += PUZZLES[options.puzzle](side, options.braid, draws)
        else:
            made.append(prefix_products(options.puzzle, side, options.snake, draws))
    return made
