"""A picture of some images of a shard set with a caption each, to see at a glance whether they belong together."""

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

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
    rows = range(first, min(first + num_images, shards.num_samples))
    if num_images < 1:
        raise ValueError(f"number of images: expected 1 or more, got {num_images}")
    if first < 0 or not rows:
        raise ValueError(f"{folder}: no images {first} to {first + num_images}; it holds {shards.num_samples:,}")
    return draw_rows(shards, {row: shards.class_names[int(shards.label[row])] for row in rows})


def draw_rows(shards: ShardSet, captions: Mapping[int, str]) -> Image.Image:
    """The images of these rows of a set, local or remote, each with its caption of a line or two below."""
    columns = min(len(captions), math.ceil(math.sqrt(len(captions) * 4 / 3)))
    lines = math.ceil(len(captions) / columns)
    text = _TEXT * max(caption.count("\n") + 1 for caption in captions.values())
    width, height = _CELL + _GAP, _CELL + text + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    with ShardReader(shards) as reader:
        images = [_cell(reader, row) for row in captions]
    for place, (image, caption) in enumerate(zip(images, captions.values(), strict=True)):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        # Pillow's built-in font has Latin letters only.
        text_lines = [line[:18] for line in caption.encode("ascii", "replace").decode().split("\n")]
        draw.text((left, top + _CELL), "\n".join(text_lines), fill="black", spacing=2)
    return sheet


def _cell(reader: ShardReader, row: int) -> Image.Image:
    try:
        return _thumbnail(reader.read(row))
    except BadSampleError:
        return Image.new("RGB", (_CELL, _CELL), _BAD)


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
