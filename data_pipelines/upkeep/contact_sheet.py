"""A picture of some images of a shard set with a caption each, to see at a glance whether they belong together."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from data_pipelines.grids.mazes import UNREACHED
from data_pipelines.image.map_png import IGNORED, MAP_MEMBER, decode_map, map_names
from data_pipelines.image.pillow_door import BadImageError, converted, opened
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.reader import BadSampleError, ShardReader

_CELL, _TEXT, _GAP = 112, 14, 6
_BAD = "red"


def draw_contact_sheet(folder: str | Path, *, first: int = 0, num_images: int = 48) -> Image.Image:
    """Images `first` to `first + num_images` in the order of the shards, each with its class name below.

    Raises ValueError when there are none.
    """
    shards = open_shards(folder)
    if shards.is_text:
        raise ValueError(f"{folder}: expected images, got text, of which there are no pictures")
    rows = range(first, min(first + num_images, shards.num_samples))
    if num_images < 1:
        raise ValueError(f"number of images: expected 1 or more, got {num_images}")
    if first < 0 or not rows:
        raise ValueError(f"{folder}: no images {first} to {first + num_images}; it holds {shards.num_samples:,}")
    if shards.members:
        return draw_rows(shards, {row: shards.key(row) for row in rows})
    return draw_rows(shards, {row: shards.class_names[int(shards.label[row])] for row in rows})


def draw_rows(shards: ShardSet, captions: Mapping[int, str]) -> Image.Image:
    """The images of these rows of a set, local or remote, each with its caption of a line or two below.

    Label map and attributes stand beside their image.
    """
    parts = ["", *map_names(shards.members).values()]
    columns = min(len(captions), math.ceil(math.sqrt(len(captions) * 4 / 3 / len(parts))))
    lines = math.ceil(len(captions) / columns)
    text = _TEXT * max(caption.count("\n") + 1 for caption in captions.values())
    width, height = _CELL * len(parts) + _GAP, _CELL + text + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    with ShardReader(shards) as reader:
        images = [[_cell(reader, shards, row, part) for part in parts] for row in captions]
    for place, (cells, caption) in enumerate(zip(images, captions.values(), strict=True)):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        for number, image in enumerate(cells):
            at = left + number * _CELL + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2
            sheet.paste(image, at)
        # Pillow's built-in font has Latin letters only.
        text_lines = [line[:18] for line in caption.encode("ascii", "replace").decode().split("\n")]
        draw.text((left, top + _CELL), "\n".join(text_lines), fill="black", spacing=2)
    return sheet


def _cell(reader: ShardReader, shards: ShardSet, row: int, member: str) -> Image.Image:
    try:
        data = reader.read(row, member)
        if not member:
            return _thumbnail(data)
        numbers = decode_map(data, member, int(shards.height[row]), int(shards.width[row]), shards.num_classes)
    except (BadSampleError, BadImageError):
        return Image.new("RGB", (_CELL, _CELL), _BAD)
    # From dark blue to yellow; black where there is no number.
    shown = numbers != (IGNORED if member == MAP_MEMBER else UNREACHED)
    colours = colormaps["viridis"](numbers / max(1, numbers[shown].max(initial=0)))[..., :3]
    return _fitted(Image.fromarray((255 * colours * shown[..., None]).astype(np.uint8)))


def _thumbnail(data: bytes) -> Image.Image:
    """The image in the size of a cell; one that cannot be read is a red cell."""
    try:
        with opened(data) as image:
            return _fitted(converted(image).convert("RGB"))
    except BadImageError:
        return Image.new("RGB", (_CELL, _CELL), _BAD)


def _fitted(pixels: Image.Image) -> Image.Image:
    """Small images are enlarged without smoothing, so that pixels stay pixels."""
    scale = _CELL / max(pixels.size)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    return pixels.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
