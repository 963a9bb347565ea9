"""Images by Pillow: only formats that are let in, one conversion for every path, and any failure is a bad image."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow's format -> ending of the tar member. MPO is a JPEG with further pictures behind the first one.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}
# By name, so that no bytes reach decoders that start other programs (EPS).
_FORMATS = [name for name in EXTENSIONS if name != "MPO"]


_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class BadImageError(ValueError):
    """Bytes that are not an image that can be used; the message is the reason."""


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The image, its header read. Raises BadImageError for whatever fails here and where it is used."""
    try:
        with Image.open(io.BytesIO(_without_notes(data)), formats=_FORMATS) as image:
            yield image
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image, or its header is broken") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"too large: {error}") from error
    except Exception as error:
        # Pillow's documentation promises OSError; its parsers raise all that Python has on damaged files.
        reason = str(error).partition(" <")[0] or type(error).__name__
        raise BadImageError(f"not a readable image: {reason}") from error


def _without_notes(data: bytes) -> bytes:
    """A PNG without texts and colour profile: Pillow refuses sound pixels where one of these unpacks to a megabyte."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or not any(note in data for note in _NOTES):
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] not in _NOTES:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def converted(image: Image.Image) -> Image.Image:
    """RGB, or L for what is grey: 16 bits become 8, transparency is dropped and the colours under it are kept."""
    # 16 bits of a PPM file are read as 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImageError(f"pixels of mode {image.mode} have no fixed range; 8 or 16 bits are expected")
    if image.mode == "P":
        # A palette with transparency converts to RGB without a warning only by way of RGBA.
        image = image.convert("RGBA")
    return image if image.mode == "L" else image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
