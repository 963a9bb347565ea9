"""Every path reads images in one way: one conversion to RGB, and whatever a library raises is a bad image."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.image.decode import decode_rgb
from data_pipelines.image.pillow_door import BadImageError, opened
from data_pipelines.upkeep.contact_sheet import _thumbnail
from data_pipelines.writing.prepare import ImageOptions, prepare_image
from tests.data.stream_shards import encoded, jpeg, smooth_image

PIXELS = smooth_image(60, 80, 0)


def _resized(data: bytes, short_side: int) -> np.ndarray[Any, Any]:
    small, _ = prepare_image(data, ImageOptions(resize=short_side, quality=100))
    return np.asarray(Image.open(io.BytesIO(small)).convert("RGB"))


def _grey_16_bits() -> bytes:
    return encoded(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16), "PNG")


def _palette(**options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).quantize(16).save(stream, "PNG", **options)
    return stream.getvalue()


def _with_alpha(mode: str) -> bytes:
    image, stream = Image.fromarray(PIXELS).convert(mode), io.BytesIO()
    image.putalpha(Image.fromarray(np.zeros(PIXELS.shape[:2], np.uint8)))
    image.save(stream, "PNG")
    return stream.getvalue()


def _ppm_of_16_bits() -> bytes:
    return b"P5 64 64 65535\n" + np.linspace(0, 65535, 64 * 64).astype(">u2").tobytes()


IMAGES = {
    "grey of 16 bits": _grey_16_bits(),
    "grey of 16 bits in PPM": _ppm_of_16_bits(),
    "palette": _palette(),
    "palette, one colour transparent": _palette(transparency=3),
    "palette, colours half transparent": _palette(transparency=bytes(range(0, 256, 16))),
    "grey, all transparent": _with_alpha("L"),
    "RGB, all transparent": _with_alpha("RGB"),
    "one bit": encoded(PIXELS[:, :, 0] > 128, "PNG"),
    "grey": encoded(PIXELS[:, :, 0], "PNG"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_path_sees_the_pixels_that_training_sees(name: str) -> None:
    data = IMAGES[name]
    pixels_HWC = decode_rgb(data).permute(1, 2, 0).numpy()
    expected = Image.fromarray(pixels_HWC)
    small = expected.resize((expected.width * 32 // expected.height, 32), Image.Resampling.BICUBIC)
    # JPEG of quality 100 keeps colours, at half resolution, within a few grey levels.
    difference = np.abs(_resized(data, 32).astype(int) - np.asarray(small.resize(small.size)).astype(int))
    assert difference.mean() < 6 and np.ptp(_resized(data, 32)) > 100
    thumbnail = _thumbnail(data)
    assert np.array_equal(np.asarray(thumbnail), np.asarray(expected.resize(thumbnail.size, Image.Resampling.NEAREST)))


def test_16_bits_are_scaled() -> None:
    for name in ("grey of 16 bits", "grey of 16 bits in PPM"):
        grey = decode_rgb(IMAGES[name])[0]
        assert int(grey.min()) == 0 and int(grey.max()) == 255 and abs(float(grey.float().mean()) - 127.5) < 1


@pytest.mark.parametrize(
    "error", [KeyError, MemoryError, struct.error, SyntaxError, TypeError, RuntimeError, ZeroDivisionError]
)
def test_whatever_a_library_raises_is_a_bad_image(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error("inside a parser")

    monkeypatch.setattr(Image, "open", broken)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", broken)
    for data in (jpeg(PIXELS), encoded(PIXELS, "PNG")):
        with pytest.raises(BadImageError, match=r"not a readable image: .*inside a parser"):
            prepare_image(data, ImageOptions())
        with pytest.raises(BadImageError):
            decode_rgb(data)
        assert _thumbnail(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_jpeg_of_441_is_read_by_pillow() -> None:
    data = bytearray(jpeg(PIXELS))
    data[data.index(b"\xff\xc0") + 11] = 0x14
    with opened(bytes(data)) as image:
        size = image.size
    _, header = prepare_image(bytes(data), ImageOptions())
    assert (header.width, header.height) == size


@given(
    kind=st.sampled_from(["PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG"]),
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    end=st.floats(0.01, 1),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:PIL.Image.DecompressionBombWarning")
def test_damaged_images_are_bad_images_or_pixels(kind: str, places: list[tuple[int, int]], end: float) -> None:
    data = bytearray(encoded(PIXELS[:20, :24], kind))
    data = data[: max(8, int(len(data) * end))]
    for place, value in places:
        data[place % len(data)] = value
    for options in (ImageOptions(), ImageOptions(check="decode"), ImageOptions(resize=8)):
        try:
            prepare_image(bytes(data), options)
        except BadImageError as error:
            assert str(error)
    _thumbnail(bytes(data))
