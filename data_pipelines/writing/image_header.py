"""What an image says of itself: format and size from its header, without decoding pixels.

The format comes from the bytes, never from the name: ImageNet has a PNG called `.JPEG`.
"""

import io
from dataclasses import dataclass

import simplejpeg
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
FORMATS = [name for name in EXTENSIONS if name != "MPO"]

# Pillow's own limit: what it would warn of as a decompression bomb is refused here.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485


class BadImageError(ValueError):
    """Bytes that must not become a sample; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """Ending of the tar member (without dot) and size in pixels."""

    extension: str
    width: int
    height: int


def read_header(data: bytes) -> ImageHeader:
    """The header of an image. Raises BadImageError for what is empty, unreadable, animated or too large."""
    if not data:
        raise BadImageError("empty file")
    extension, width, height, num_frames = _jpeg_header(data) or _any_header(data)
    if width < 1 or height < 1:
        raise BadImageError(f"size {width} x {height}")
    if width * height > MAX_PIXELS:
        raise BadImageError(f"too large: {width} x {height} pixels, the limit is {MAX_PIXELS:,} pixels")
    if num_frames > 1:
        raise BadImageError(f"animated: {num_frames} frames")
    return ImageHeader(extension=extension, width=width, height=height)


def _jpeg_header(data: bytes) -> tuple[str, int, int, int] | None:
    """By libjpeg-turbo, which takes 5 us where Pillow takes 80; None for what is no JPEG or a broken one."""
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return "jpg", width, height, 1


def _any_header(data: bytes) -> tuple[str, int, int, int]:
    """By Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
            num_frames = 1 if kind in ("JPEG", "MPO", "BMP", "PPM") else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise BadImageError("not an image, or its header is broken") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImageError(f"broken header: {error}") from None
    return EXTENSIONS[kind], width, height, num_frames
