"""An image file to the bytes that go into the shard: kept as they are, or smaller and encoded again."""

import io
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageOps

from data_pipelines.image.pillow_door import converted, opened
from data_pipelines.writing.image_header import ImageHeader, orientation, read_header

BadImagePolicy = Literal["fail", "skip", "quarantine"]
BAD_IMAGE_POLICIES: tuple[str, ...] = get_args(BadImagePolicy)
Check = Literal["header", "decode"]
CHECKS: tuple[str, ...] = get_args(Check)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images become samples.

    `on_bad`: what to do with a bad image. `check`: read the header only, or decode all pixels as training will.
    `resize`: images with a longer short side are reduced to this one (pixels) and become JPEG of `quality`; None keeps
    all bytes. `metadata` adds a .json member with class and origin.
    """

    on_bad: BadImagePolicy = "fail"
    check: Check = "header"
    resize: int | None = None
    quality: int = 95
    metadata: bool = True

    def __post_init__(self) -> None:
        if self.on_bad not in BAD_IMAGE_POLICIES:
            raise ValueError(f"on_bad {self.on_bad!r}: expected one of {', '.join(BAD_IMAGE_POLICIES)}")
        if self.check not in CHECKS:
            raise ValueError(f"check {self.check!r}: expected one of {', '.join(CHECKS)}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize {self.resize}: expected the short side in pixels, 1 or more")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}: expected 1 to 100")


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
