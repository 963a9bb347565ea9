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
from data_pipelines.sources.listing import Listing, Places

Puzzle = Literal["reach", "twins", "path", "z2", "s3", "a5"]
_LARGEST = 255


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What is made. Of more samples the first ones are the same.

    `puzzle`: one of mazes, or the group of products. `smallest`, `largest`: pixels a side, drawn for each sample (pair
    of twins); those of mazes are odd. `braid`: the share of a maze's dead ends that get a second way out. `snake`:
    products go back in every second row.
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
        sizes, least, step = (self.smallest, self.largest), 5 if self.is_maze else 1, 2 if self.is_maze else 1
        if not least <= self.smallest <= self.largest <= _LARGEST or any(size % 2 < step - 1 for size in sizes):
            what = f"odd numbers of pixels from {least}" if self.is_maze else "numbers of pixels from 1"
            raise ValueError(f"size {self.smallest}-{self.largest}: expected {what} to {_LARGEST}")
        if self.count < 1 or (self.puzzle == "twins" and self.count % 2):
            raise ValueError(f"count {self.count}: expected 1 or more, and an even number of twins")
        if not 0 <= self.braid <= 1 or (not self.is_maze and self.braid) or (self.is_maze and self.snake):
            raise ValueError(f"braid {self.braid:g}, snake {self.snake}: expected 0 to 1 for mazes, snake for products")

    @property
    def is_maze(self) -> bool:
        return self.puzzle in PUZZLES

    @property
    def num_together(self) -> int:
        """Samples that are made at once."""
        return 2 if self.puzzle == "twins" else 1

    @property
    def class_names(self) -> list[str]:
        """What the labels of pixels are called."""
        if self.is_maze:
            return ["off the path", "on the path"] if self.puzzle == "path" else ["unreached", "reached"]
        return ["".join(map(str, element)) for element in group_table(self.puzzle)]


def list_grids(options: GridOptions, split: str | None = None) -> Listing:
    """The listing of what is to be made; there are no splits.

    The label of a whole sample is 0, but of twins whether the target is reached.
    """
    text = json.dumps(asdict(options))
    members = [f"{name}.png" for name in _made(text, 0) if name]
    rows = np.arange(options.count, dtype=np.int64)
    # As if all had the largest size: shards are cut by it.
    length = np.full(options.count, len(encode_png(np.zeros((options.largest, options.largest, 3), np.uint8))))
    image, *others = (Places(np.full(options.count, part, np.int32), rows, length) for part in range(1 + len(members)))
    return Listing(
        class_names=options.class_names,
        paths=pack_strings(f"{member} {text}" for member in ["", *members]),
        **image._asdict(),
        label=(rows % options.num_together).astype(np.int32),
        keys=pack_strings(f"{options.puzzle}-{row:06d}" for row in range(options.count)),
        names=pack_strings(f"{options.puzzle}[{row}]" for row in range(options.count)),
        members=dict(zip(members, others, strict=True)),
    )


class GridReader:
    """Makes what a listing of `list_grids` names."""

    def read(self, path: str, offset: int, length: int) -> bytes:
        member, _, text = path.partition(" ")
        return encode_png(_made(text, offset)[member.removesuffix(".png")])

    def close(self) -> None:
        """Nothing is open."""


def _made(text: str, index: int) -> Pixels:
    """The pixels of sample `index` by member; `text`: the options."""
    number, place = divmod(index, _parsed(text).num_together)
    return _together(text, number)[place]


@lru_cache(maxsize=1)
def _together(text: str, number: int) -> list[Pixels]:
    """A sample, or a pair of twins. Members of one are asked for one after another."""
    options = _parsed(text)
    draws = KeyedDraws("grid", options.seed, number)
    step = 2 if options.is_maze else 1
    side = options.smallest + step * draws.below((options.largest - options.smallest) // step + 1)
    if options.is_maze:
        return PUZZLES[options.puzzle](side, options.braid, draws)
    return [prefix_products(options.puzzle, side, options.snake, draws)]


@lru_cache(maxsize=4)
def _parsed(text: str) -> GridOptions:
    return parse_checked(text.encode(), GridOptions, "the options of a grid")
