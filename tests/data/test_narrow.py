"""The centre of a narrow image is what resizing all of it would give, in little memory."""

import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.image import view


@given(
    short=st.integers(2, 40),
    ratio=st.floats(4, 60),
    image_size=st.integers(8, 64),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    is_tall=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_centre_made_alone_is_half_a_pixel_off_at_most(
    short: int, ratio: float, image_size: int, interpolation: str, is_tall: bool
) -> None:
    short = min(short, image_size)
    # Ramps up and down, a grey level a pixel, tell by their values where they were sampled.
    ramp_HW = np.abs(np.arange(int(short * ratio)) % 400 - 200)[None].repeat(short, axis=0)
    pixels_HW = np.ascontiguousarray(ramp_HW.T if is_tall else ramp_HW).astype(np.uint8)
    image_CHW = torch.from_numpy(pixels_HW)[None].repeat(3, 1, 1)
    config = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]
    expected_CHW = view.centre_pixels(image_CHW, config, image_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "_MOST_RESIZED_PIXELS", 0)
        difference_CHW = view.centre_pixels(image_CHW, config, image_size).int() - expected_CHW.int()
    assert int(difference_CHW.abs().max()) <= 2


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 200_000), (3, 1_000_000)])
def test_a_narrow_image_takes_little_memory(shape: tuple[int, int]) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image_CHW = torch.full((3, *shape), 77, dtype=torch.uint8)
    pixels_CHW = view.centre_pixels(image_CHW, DataConfig(), 224)
    assert pixels_CHW.shape == (3, 224, 224) and bool((pixels_CHW == 77).all())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**20
