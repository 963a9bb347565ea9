"""Decoding a box gives the bits of decoding the whole image, with the optional library and without it."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from data_pipelines import roi
from data_pipelines.config import DataConfig
from data_pipelines.decode import DecodeError, decode_box, decode_rgb
from data_pipelines.view import View, draw_view
from tests.stream_shards import encoded, jpeg, smooth_image


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library, built for this test alone; skips where there is no compiler or no libjpeg-turbo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi, "LIBRARY", tmp_path_factory.mktemp("roi") / "_roi_decode.so")
        roi._library.cache_clear()
        try:
            roi.build()
        except RuntimeError as error:
            pytest.skip(f"the library cannot be built here: {error}")
        yield
    roi._library.cache_clear()


def _jpeg(pixels: np.ndarray[Any, Any], subsampling: str, *, is_progressive: bool) -> bytes:
    if subsampling in ("440", "411"):
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", subsampling))
    options: dict[str, Any] = {"quality": 90, "progressive": is_progressive}
    if subsampling == "grey":
        return encoded(pixels[:, :, 0], "JPEG", **options)
    return encoded(pixels, "JPEG", subsampling={"444": 0, "422": 1, "420": 2}[subsampling], **options)


@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "grey"])
@pytest.mark.usefixtures("library")
def test_a_box_has_the_bits_of_the_whole_image(subsampling: str, is_progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    for pixels in (smooth_image(119, 150, 1), noise, noise[:9, :11]):
        data = _jpeg(pixels, subsampling, is_progressive=is_progressive)
        whole_CHW = decode_rgb(data)
        for index in range(40):
            top, left, height, width, _ = draw_view(DataConfig(), *pixels.shape[:2], seed=0, number=0, index=index)
            box_HWC = roi.decode_box(data, top, left, height, width)
            assert box_HWC is not None
            expected_CHW = whole_CHW[:, top : top + height, left : left + width]
            assert torch.equal(torch.from_numpy(box_HWC).permute(2, 0, 1), expected_CHW)


def _draw(height: int, width: int) -> View:
    return draw_view(DataConfig(), height, width, seed=0, number=0, index=3)


@pytest.mark.usefixtures("library")
def test_what_the_library_leaves_is_decoded_whole() -> None:
    stream = io.BytesIO()
    Image.fromarray(smooth_image(40, 50, 0)).convert("CMYK").save(stream, "JPEG")
    with_tail = jpeg(smooth_image(40, 50, 0)) + b"tail"
    for data in (stream.getvalue(), with_tail, encoded(smooth_image(40, 50, 0), "PNG")):
        box_CHW, view = decode_box(data, _draw)
        top, left, height, width, _ = view
        assert torch.equal(box_CHW, decode_rgb(data)[:, top : top + height, left : left + width])


@pytest.mark.usefixtures("library")
def test_a_cut_image_is_refused_wherever_the_box_lies() -> None:
    data = jpeg(smooth_image(400, 50, 0))[:-100]
    with pytest.raises(DecodeError, match="truncated"):
        decode_box(data, lambda height, width: (0, 0, 8, 8, 0))


def test_without_the_library_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roi, "LIBRARY", tmp_path / "absent.so")
    roi._library.cache_clear()
    data = jpeg(smooth_image(40, 50, 0))
    assert roi.decode_box(data, 0, 0, 8, 8) is None
    box_CHW, (top, left, height, width, _) = decode_box(data, _draw)
    assert torch.equal(box_CHW, decode_rgb(data)[:, top : top + height, left : left + width])
    roi._library.cache_clear()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roi, "LIBRARY", tmp_path / "_roi_decode.so")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C compiler 'no-such-compiler'"):
        roi.build()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="libjpeg-dev"):
        roi.build()
    assert list(tmp_path.iterdir()) == []
