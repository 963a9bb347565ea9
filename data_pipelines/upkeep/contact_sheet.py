"""A picture of the first images of a shard set with their labels, to see at a glance that they belong together."""

import math
import os
from pathlib import Path

from PIL import Image, ImageDraw

from data_pipelines.image.pillow_door import BadImageError, converted, opened
from data_pipelines.shards.index import ShardSet, open_shards

_CELL, _TEXT, _GAP = 112, 14, 6
_BAD = "red"


def draw_contact_sheet(folder: str | Path, *, first: int = 0, num_images: int = 48) -> Image.Image:
    """Images `first` to `first + num_images` in the order of the shards, each with its class name below.

    Raises ValueError when there are none.
    """
    shards = open_shards(folder)
    rows = range(first, min(first + num_images, shards.num_samples))
    if num_images < 1:
        raise ValueError(f"number of images: expected 1 or more, got {num_images}")
    if first < 0 or not rows:
        raise ValueError(f"{folder}: no images {first} to {first + num_images}; it holds {shards.num_samples:,}")
    columns = min(len(rows), math.ceil(math.sqrt(len(rows) * 4 / 3)))
    lines = math.ceil(len(rows) / columns)
    width, height = _CELL + _GAP, _CELL + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        image = _thumbnail(_read(shards, row))
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        # Pillow's built-in font has Latin letters only.
        name = shards.class_names[int(shards.label[row])].encode("ascii", "replace").decode()
        draw.text((left, top + _CELL), name[:18], fill="black")
    return sheet


def _read(shards: ShardSet, row: int) -> bytes:
    with (shards.folder / shards.shard_names[int(shards.shard_of[row])]).open("rb") as file:
        return os.pread(file.fileno(), int(shards.length[row]), int(shards.offset[row]))


def _thumbnail(data: bytes) -> Image.Image:
    """The image in the size of a cell; small ones are enlarged without smoothing, so that pixels stay pixels.

    One that cannot be read is a red cell.
    """
    try:
        with opened(data) as image:
            pixels = converted(image).convert("RGB")
    except BadImageError:
        return Image.new("RGB", (_CELL, _CELL), _BAD)
    scale = _CELL / max(pixels.size)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    return pixels.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
