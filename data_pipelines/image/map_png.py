"""PNG of label maps and of attributes of pixels: written without compression, and read as the numbers that they hold.

Pillow's conversions are for pictures; here 7 must stay 7. Imports no torch, as writers of shards have no use for it.
"""

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.pillow_door import BadImageError, opened

MAP_MEMBER = "map.png"
"""The member with the labels of a sample's pixels; further members `NAME.png` are attributes."""
IGNORED = 255
"""The label of pixels of which nothing is asked."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bits and colour type, as PNG's header has them: grey (0) or numbers of a palette (3); and what a message calls them.
_KINDS = ((8, 0), (8, 3)), "8 bits a pixel, grey or with a palette"
_ATTRIBUTE_KINDS = ((8, 0), (16, 0)), "8 or 16 bits a pixel, grey"


def map_names(members: Iterable[str]) -> dict[str, str]:
    """Name -> member, of those members (endings) of a set that are label maps or attributes: map -> map.png."""
    return {name.removesuffix(".png"): name for name in members if name.endswith(".png")}


def encode_png(pixels: NDArray[Any]) -> bytes:
    """A PNG of grey pixels (H, W) of 8 or 16 bits, or of RGB pixels (H, W, 3) of 8, not compressed: deflate's output
    differs between zlib versions, and equal sources must give equal shards on every machine. Small images would gain
    little, since tars pad to 512 bytes.
    """
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].nbytes), np.uint8)  # filter type 0 before each line
    lines[:, 1:] = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 0)), (b"IEND", b""))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def decode_maps(
    members: Iterable[str], read: Callable[[str], bytes], height: int, width: int, num_classes: int
) -> dict[str, NDArray[Any]]:
    """Label map and attributes of a sample by name, as `decode_map` gives them; `read`: the bytes of a member."""
    return {
        name: decode_map(read(member), member, height, width, num_classes)
        for name, member in map_names(members).items()
    }


def decode_map(data: bytes, member: str, height: int, width: int, num_classes: int) -> NDArray[Any]:
    """The numbers (height, width) of a member: uint8 labels of the map, uint16 or uint8 of an attribute.

    Raises BadImageError, with the member's name, for what is none, has another size than its image, or a label that is
    neither a class nor `IGNORED`.
    """
    try:
        if not data:
            raise BadImageError("missing or empty, and other samples have one")
        kinds, in_words = _KINDS if member == MAP_MEMBER else _ATTRIBUTE_KINDS
        if not data.startswith(_SIGNATURE) or tuple(data[24:26]) not in kinds:
            raise BadImageError(f"expected a PNG of {in_words}")
        with opened(data) as image:
            if (size := image.size) != (width, height):
                raise BadImageError(f"{size[0]} x {size[1]} pixels, expected those of its image, {width} x {height}")
            numbers: NDArray[Any] = np.asarray(image)
        outside = numbers[(numbers >= num_classes) & (numbers != IGNORED)]
        if member == MAP_MEMBER and len(outside):
            raise BadImageError(f"label {outside[0]}, expected 0 to {num_classes - 1}, or {IGNORED} for nothing asked")
    except BadImageError as error:
        raise BadImageError(f"{member}: {error}") from error
    return numbers
