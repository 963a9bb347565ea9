"""The centre of a narrow image has the pixels that resizing all of it would give, in little memory."""

import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.image import view


@given(
    short=st.integers(1, 40),
    ratio=st.floats(1, 60),
    image_size=st.integers(8, 64),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    is_tall=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_a_centre_made_alone_has_the_same_pixels(
    short: int, ratio: float, image_size: int, interpolation: str, is_tall: bool, seed: int
) -> None:
    short = min(short, image_size)
    shape = (int(short * ratio), short) if is_tall else (short, int(short * ratio))
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image_CHW = torch.from_numpy(noise_HWC).permute(2, 0, 1)
    config = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]
    expected_CHW = view.centre_pixels(image_CHW, config, image_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "_MOST_RESIZED_PIXELS", 0)
        assert torch.equal(view.centre_pixels(image_CHW, config, image_size), expected_CHW)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 200_000), (3, 1_000_000)])
def test_a_narrow_image_takes_little_memory(shape: tuple[int, int]) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image_CHW = torch.full((3, *shape), 77, dtype=torch.uint8)
    pixels_CHW = view.centre_pixels(image_CHW, DataConfig(), 224)
    assert pixels_CHW.shape == (3, 224, 224) and bool((pixels_CHW == 77).all())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**20
