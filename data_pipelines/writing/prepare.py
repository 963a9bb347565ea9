"""An image file to the bytes that go into the shard: kept as they are, or smaller and encoded again."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps

from data_pipelines.field_checks import check_fields
from data_pipelines.image.pillow_door import converted, opened
from data_pipelines.writing.image_header import ImageHeader, orientation, read_header


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images become samples.

    `on_bad`: what to do with a bad image. `check`: read the header only, or decode all pixels as training will.
    `resize`: images with a longer short side are reduced to this one (pixels) and become JPEG of `quality`; None keeps
    all bytes. `metadata` adds a .json member with class and origin.
    """

    on_bad: Literal["fail", "skip", "quarantine"] = "fail"
    check: Literal["header", "decode"] = "header"
    resize: int | None = None
    quality: int = 95
    metadata: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "image options", {"at least 1": "resize", "1 to 100": "quality"})


def prepare_image(data: bytes, options: ImageOptions) -> tuple[bytes, ImageHeader]:
    """The bytes to store and their header. Raises BadImageError."""
    header = read_header(data)
    if options.check == "decode":
        _check_pixels(data)
    is_small = options.resize is not None and min(header.width, header.height) <= options.resize
    if options.resize is None or (is_small and orientation(data) == 1):
        return data, header
    return _reduced(data, options.resize, options.quality)


def _check_pixels(data: bytes) -> None:
    # Here, because torch takes more than a second to import in each worker, and most runs check headers only.
    from data_pipelines.image.decode import decode_rgb

    decode_rgb(data)


def _reduced(data: bytes, short_side: int, quality: int) -> tuple[bytes, ImageHeader]:
    """The image with that short side as RGB or grey JPEG, like torchvision's Resize (antialiased, bicubic)."""
    is_upright = orientation(data) == 1
    with opened(data) as image:
        # The copy has no EXIF data that would say it later.
        pixels = converted(image if is_upright else ImageOps.exif_transpose(image))
        scale = min(1.0, short_side / min(pixels.size))
        width, height = (max(min(side, short_side), int(side * scale)) for side in pixels.size)
        small = pixels.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), ImageHeader(extension="jpg", width=width, height=height)
