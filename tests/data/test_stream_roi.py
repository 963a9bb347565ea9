"""Views have the bits of decoding the whole image and resizing by torch, with the optional library and without it."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.image.decode import decode_rgb, decode_view
from data_pipelines.image.native import library as roi
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.image.view import View, box_pixels, draw_view
from tests.data.stream_shards import encoded, jpeg, smooth_image

# The library is compiled.
pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module", params=["cc", "cc -DROI_PLAIN"])
def library(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """The library, built for this test alone; skips where there is no compiler or no libjpeg-turbo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi, "LIBRARY", tmp_path_factory.mktemp("roi") / "_roi_decode.so")
        patch.setenv("CC", request.param)
        if request.param != "cc":
            # The tests themselves check it; starting a process for it takes seconds.
            run = roi._run
            patch.setattr(roi, "_run", lambda command: None if "check" in command else run(command))
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


GUARD_BYTES = 4096


def _expected(data: bytes, view: View, size: int, interpolation: str) -> torch.Tensor:
    top, left, height, width, flip = view
    config = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]
    return box_pixels(decode_rgb(data)[:, top : top + height, left : left + width], flip, config, size)


def _got(data: bytes, view: View, size: int, interpolation: str) -> torch.Tensor | None:
    """What the library makes of a view, or None when it leaves it. It writes nothing beside its pixels."""
    memory = np.full(3 * size * size + 2 * GUARD_BYTES, 0xA5, np.uint8)
    out_CHW = memory[GUARD_BYTES:-GUARD_BYTES].reshape(3, size, size)
    is_decoded = roi.decode_view(data, view, interpolation, out_CHW)
    assert (memory[:GUARD_BYTES] == 0xA5).all() and (memory[-GUARD_BYTES:] == 0xA5).all()
    return torch.from_numpy(out_CHW) if is_decoded else None


def _decoded(data: bytes, draw: Callable[[int, int], View], size: int) -> tuple[torch.Tensor, View]:
    out_CHW = np.empty((3, size, size), np.uint8)
    view = decode_view(data, draw, CONFIG, out_CHW)
    return torch.from_numpy(out_CHW), view


@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "grey"])
@pytest.mark.usefixtures("library")
@pytest.mark.multi_process
def test_a_view_has_the_bits_of_the_whole_image_resized(subsampling: str, is_progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    for pixels in (smooth_image(119, 150, 1), noise, noise[:9, :11]):
        data = _jpeg(pixels, subsampling, is_progressive=is_progressive)
        for index in range(12):
            view = draw_view(DataConfig(), *pixels.shape[:2], seed=0, number=0, index=index)
            size, interpolation = (7, 32, 50)[index % 3], ("bilinear", "bicubic")[index % 2]
            got_CHW = _got(data, view, size, interpolation)
            assert got_CHW is not None
            assert torch.equal(got_CHW, _expected(data, view, size, interpolation))


# Waves of 8 pixels whose coefficients have many bits each, so that a decoder that counts them short runs out.
_FREQUENCIES = {(1, 1): 3.0, (2, 1): 3.0, (2, 2): 3.0, (1, 3): 300.0}


def _waves(height: int, width: int, noise: float) -> np.ndarray[Any, Any]:
    """A grey photograph of a grating: RGB pixels (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    pixels = np.full((height, width), 128.0)
    for (down, across), value in _FREQUENCIES.items():
        pixels += value / 4 * np.cos((2 * y + 1) * down * np.pi / 16) * np.cos((2 * x + 1) * across * np.pi / 16)
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    return np.repeat(pixels.clip(0, 255).round().astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.lengthy
@pytest.mark.parametrize("quality", [98, 99, 100])
@pytest.mark.usefixtures("library")
def test_photographs_of_high_quality_have_the_same_bits(quality: int) -> None:
    photographs = [_waves(240, 320, noise) for noise in (0.3, 0.6, 2.0)] + [smooth_image(240, 320, 1)]
    for place, pixels in enumerate(photographs):
        data = encoded(pixels, "JPEG", quality=quality, subsampling=2 * (place % 2))
        for index in range(25):
            view = draw_view(DataConfig(), *pixels.shape[:2], seed=0, number=0, index=index)
            got_CHW = _got(data, view, 32, "bicubic")
            assert got_CHW is not None
            assert torch.equal(got_CHW, _expected(data, view, 32, "bicubic"))


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(1, 130),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    quality=st.integers(5, 100),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.usefixtures("library")
def test_any_size_and_quality_has_the_same_bits(
    height: int, width: int, size: int, interpolation: str, quality: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG", quality=quality, optimize=bool(seed % 2))
    view = draw_view(DataConfig(crop_scale=(0.01, 1.0)), height, width, seed=seed, number=0, index=0)
    got_CHW = _got(data, view, size, interpolation)
    assert got_CHW is not None
    assert torch.equal(got_CHW, _expected(data, view, size, interpolation))


@given(
    places=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    end=st.floats(0.3, 1),
    is_progressive=st.booleans(),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.usefixtures("library")
def test_damaged_bytes_give_the_pixels_of_the_whole_image_or_nothing(
    places: list[tuple[int, int]], end: float, is_progressive: bool
) -> None:
    whole = _jpeg(smooth_image(60, 80, 0), "420", is_progressive=is_progressive)
    data = bytearray(whole[: int(len(whole) * end)] + whole[-2:])
    for place, value in places:
        data[place % (len(data) - 2)] = value
    for top in (0, 20):
        view = (top, 20, 30, 30, 0)
        got_CHW = _got(bytes(data), view, 16, "bilinear")
        try:
            expected_CHW = _expected(bytes(data), view, 16, "bilinear")
        except BadImageError:
            # Damage below the box is not seen there (docs/data.md).
            continue
        assert got_CHW is None or torch.equal(got_CHW, expected_CHW)


CONFIG = DataConfig()


def _draw(height: int, width: int) -> View:
    return draw_view(CONFIG, height, width, seed=0, number=0, index=3)


@pytest.mark.usefixtures("library")
def test_what_the_library_leaves_is_decoded_whole() -> None:
    stream = io.BytesIO()
    Image.fromarray(smooth_image(40, 50, 0)).convert("CMYK").save(stream, "JPEG")
    with_tail = jpeg(smooth_image(40, 50, 0)) + b"tail"
    for data in (stream.getvalue(), with_tail, encoded(smooth_image(40, 50, 0), "PNG")):
        pixels_CHW, view = _decoded(data, _draw, 24)
        assert torch.equal(pixels_CHW, _expected(data, view, 24, "bicubic"))


@pytest.mark.usefixtures("library")
def test_a_cut_image_is_refused_wherever_the_box_lies() -> None:
    data = jpeg(smooth_image(400, 50, 0))[:-100]
    with pytest.raises(BadImageError, match="truncated"):
        _decoded(data, lambda height, width: (0, 0, 8, 8, 0), 8)
    # An end of image in the middle is too few bits, which the library must notice itself.
    cut = data[: len(data) // 2] + b"\xff\xd9"
    assert _got(cut, (300, 0, 50, 50, 0), 8, "bilinear") is None


def test_without_the_library_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roi, "LIBRARY", tmp_path / "absent.so")
    roi._library.cache_clear()
    data = jpeg(smooth_image(40, 50, 0))
    assert _got(data, (0, 0, 8, 8, 0), 8, "bilinear") is None
    pixels_CHW, view = _decoded(data, _draw, 24)
    assert torch.equal(pixels_CHW, _expected(data, view, 24, "bicubic"))
    roi._library.cache_clear()


def test_a_library_of_older_sources_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(roi, "LIBRARY", tmp_path / "_roi_decode.00000002.so")
    monkeypatch.setattr(roi, "__file__", str(tmp_path / "library.py"))
    (tmp_path / "_roi_decode.00000001.so").touch()
    roi._library.cache_clear()
    assert not roi.is_in_use() and roi.is_stale()
    assert "python -m data_pipelines.image.native.library" in caplog.text
    roi._library.cache_clear()


@pytest.mark.usefixtures("library")
def test_a_library_with_other_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build ends with a check: here by another view than the one that is asked for."""
    right = roi._view
    monkeypatch.setattr(roi, "_view", lambda library, data, view, *rest: right(library, data, (0, *view[1:]), *rest))
    with pytest.raises(ValueError, match="its pixels are not those of simplejpeg and torch"):
        roi.check(roi.LIBRARY)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roi, "LIBRARY", tmp_path / "_roi_decode.so")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no C compiler 'no-such-compiler'"):
        roi.build()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="libjpeg-dev"):
        roi.build()
    assert list(tmp_path.iterdir()) == []
