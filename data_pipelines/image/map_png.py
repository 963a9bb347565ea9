"""PNG of label maps and of attributes of pixels: written without compression, and read as the numbers that they hold.

Pillow's conversions are for pictures; here 7 must stay 7. Imports no torch, as writers of shards have no use for it.
"""

import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.pillow_door import BadImageError, opened

MAP_MEMBER = "map.png"
"""The member with the labels of a sample's pixels; further members `NAME.png` are attributes."""
IGNORED = 255
"""The label of pixels of which nothing is asked."""
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types of PNG


def map_names(members: Iterable[str]) -> dict[str, str]:
    """Name -> member, of those members (endings) of a set that are label maps or attributes: map -> map.png."""
    return {name.removesuffix(".png"): name for name in members if name.endswith(".png")}


def encode_png(pixels: NDArray[Any]) -> bytes:
    """A PNG of grey pixels (H, W) of 8 or 16 bits, or of RGB pixels (H, W, 3) of 8, not compressed: deflate's output
    differs between zlib versions, and equal sources must give equal shards on every machine. Small images would gain
    little, since tars pad to 512 bytes.
    """
    height, width = pixels.shape[:2]
    # Filter type 0 before each line; PNG's numbers are big-endian.
    lines = np.zeros((height, 1 + pixels[0].nbytes), np.uint8)
    lines[:, 1:] = pixels.astype(pixels.dtype.newbyteorder(">"), copy=False).reshape(height, -1).view(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, _GREY if pixels.ndim == 2 else _RGB, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def decode_map(data: bytes, member: str, height: int, width: int, num_classes: int | None = None) -> NDArray[Any]:
    """The numbers (height, width) of a member: uint8 labels of the map, uint16 or uint8 of an attribute.

    Raises BadImageError, with the member's name, for what is none, has another size than its image, or, where
    `num_classes` says what labels there are, has a label that is neither one of these nor `IGNORED`.
    """
    if not data:
        raise BadImageError(f"{member}: missing, and other samples have one")
    bits, colour = data[24:26] if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 26 else (0, 0)
    kinds = ((8, _GREY), (8, _PALETTE)) if member == MAP_MEMBER else ((8, _GREY), (16, _GREY))
    if (bits, colour) not in kinds:
        expected = "8 bits a pixel, grey or with a palette" if member == MAP_MEMBER else "8 or 16 bits a pixel, grey"
        raise BadImageError(f"{member}: expected a PNG of {expected}")
    with opened(data) as image:
        if image.size != (width, height):
            raise BadImageError(
                f"{member}: {image.width} x {image.height} pixels, expected those of its image, {width} x {height}"
            )
        numbers: NDArray[Any] = np.asarray(image)
    if member == MAP_MEMBER and num_classes is not None:
        outside = (numbers >= num_classes) & (numbers != IGNORED)
        if outside.any():
            row, column = np.argwhere(outside)[0].tolist()
            raise BadImageError(
                f"{member}: label {numbers[row, column]} in row {row}, column {column}, expected 0 to"
                f" {num_classes - 1}, or {IGNORED} where nothing is asked"
            )
    return numbers
