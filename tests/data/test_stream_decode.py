"""Pixels: every format ends as uint8 RGB, and what is no image is a BadImageError with a reason."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.image.decode import decode_rgb
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.writing.image_header import read_header
from tests.data.stream_shards import encoded, jpeg, smooth_image

PIXELS = smooth_image(40, 50, seed=1)


def _as_hwc(data: bytes, **options: Any) -> np.ndarray[Any, Any]:
    image_CHW = decode_rgb(data, **options)
    assert image_CHW.dtype == torch.uint8 and image_CHW.shape[0] == 3
    return image_CHW.permute(1, 2, 0).numpy()


def test_jpeg_is_what_pillow_decodes() -> None:
    data = jpeg(PIXELS)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(_as_hwc(data) - expected).mean() < 0.5


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(_as_hwc(encoded(PIXELS, kind, **options)), PIXELS)


def test_grey_images_become_rgb() -> None:
    grey = PIXELS[:, :, 0]
    for data in (encoded(grey, "PNG"), encoded(grey, "JPEG", quality=95)):
        got = _as_hwc(data)
        assert got.shape == (40, 50, 3) and np.array_equal(got[:, :, 0], got[:, :, 2])
        assert np.abs(got[:, :, 0].astype(int) - grey).mean() < 2


def test_16_bit_grey_keeps_its_high_byte() -> None:
    grey = PIXELS[:, :, 0].astype(np.uint16) * 257
    assert np.array_equal(_as_hwc(encoded(grey, "PNG"))[:, :, 1], PIXELS[:, :, 0])


def test_palettes_and_transparency_are_dropped() -> None:
    rgba = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 128, np.uint8)])
    assert np.array_equal(_as_hwc(encoded(rgba, "PNG")), PIXELS)
    stream = io.BytesIO()
    palette = Image.fromarray(PIXELS).quantize(16)
    palette.save(stream, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(_as_hwc(stream.getvalue()), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "head", "is_packed"),
    [
        (b"zTXt", b"Comment\0\0", True),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0", True),
        (b"iCCP", b"profile\0\0", True),
        (b"tEXt", b"Comment\0", False),
    ],
)
def test_notes_of_any_size_beside_the_pixels_of_a_png_are_passed_over(
    kind: bytes, head: bytes, is_packed: bool
) -> None:
    note = b"x" * (3 << 20)
    content = kind + head + (zlib.compress(note) if is_packed else note)
    chunk = (len(content) - 4).to_bytes(4) + content + zlib.crc32(content).to_bytes(4)
    plain = encoded(PIXELS, "PNG")
    data = plain[:33] + chunk + plain[33:]
    assert np.array_equal(_as_hwc(data), PIXELS)
    assert (read_header(data).width, read_header(data).height) == (50, 40)
    # What is cut off inside such a note has no pixels.
    for length in (40, 8 + 25 + 5, len(data) - len(plain) + 20):
        with pytest.raises(BadImageError):
            decode_rgb(data[:length])


def test_cmyk_jpeg_is_decoded_by_pillow() -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(stream, "JPEG", quality=95)
    assert np.abs(_as_hwc(stream.getvalue()).astype(int) - PIXELS).mean() < 3


def _animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(smooth_image(8, 8, seed)) for seed in (1, 2)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"not an image", "not an image, or its header is broken"),
        (jpeg(PIXELS)[:200], "not a readable image"),
        (jpeg(PIXELS)[:-300], "not a readable image: image file is truncated"),
        (encoded(PIXELS, "PNG")[:-300], "not a readable image"),
        (_animation(), "animated image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image, or its header is broken"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_rgb(data)


def test_a_bomb_is_refused_by_its_header() -> None:
    for data in (encoded(PIXELS, "PNG"), jpeg(PIXELS)):
        with pytest.raises(BadImageError, match="image of 50 x 40 pixels, larger than the limit of 1999"):
            decode_rgb(data, max_pixels=1999)
        assert decode_rgb(data, max_pixels=2000).shape == (3, 40, 50)


def test_a_jpeg_of_30000_pixels_squared_is_refused_in_no_time() -> None:
    header = bytearray(jpeg(smooth_image(16, 16, seed=0)))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = (30_000).to_bytes(2, "big") * 2
    with pytest.raises(BadImageError, match="image of 30000 x 30000 pixels"):
        decode_rgb(bytes(header))
