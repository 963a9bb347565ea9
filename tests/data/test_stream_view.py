"""Views: drawn as a pure function, distributed as torchvision's, with the pixels that Pillow gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.image.torchvision_door import v2
from data_pipelines.image.view import centre_pixels, draw_view, training_pixels, view_number
from tests.data.stream_shards import smooth_image
from tests.reference.resized_crop import resized_crop

RESIZED = DataConfig()


@given(height=st.integers(1, 500), width=st.integers(1, 500), seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_views_lie_in_the_image_and_are_repeatable(height: int, width: int, seed: int, index: int) -> None:
    for crop in ("resized", "padded", "centre"):
        config = DataConfig(crop=crop)
        padding = 4 if crop == "padded" else 0
        view = draw_view(config, height, width, seed=seed, number=3, index=index)
        top, left, box_height, box_width, flip = view
        assert 0 <= top <= height + 2 * padding - box_height and 0 < box_height <= height
        assert 0 <= left <= width + 2 * padding - box_width and 0 < box_width <= width
        assert flip in (0, 1)
        assert view == draw_view(config, height, width, seed=seed, number=3, index=index)


def test_views_differ_by_seed_number_and_sample() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    views = [draw_view(RESIZED, 375, 500, seed=seed, number=number, index=index) for seed, number, index in keys]
    assert len(set(views)) == len(views)


def test_repeats_and_epochs_have_views_of_their_own_until_views_come_again() -> None:
    config = DataConfig(num_repeats=3)
    assert [view_number(config, epoch, repeat) for epoch in (0, 1) for repeat in (0, 1, 2)] == [0, 1, 2, 3, 4, 5]
    assert [view_number(replace(config, num_views=4), 1, repeat) for repeat in (0, 1, 2)] == [3, 0, 1]


def test_boxes_are_distributed_as_torchvision_draws_them() -> None:
    torch.manual_seed(0)
    image_CHW = torch.zeros(3, 375, 500, dtype=torch.uint8)
    theirs = np.array([_torchvision_box(image_CHW) for _ in range(2000)])
    ours = np.array([draw_view(RESIZED, 375, 500, seed=0, number=0, index=i)[:4] for i in range(2000)])
    flips = np.mean([draw_view(RESIZED, 375, 500, seed=0, number=0, index=i)[4] for i in range(2000)])
    assert abs(flips - 0.5) < 5 * 0.0112
    for column in range(4):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert abs(np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)) < 25


def _torchvision_box(image_CHW: torch.Tensor) -> list[int]:
    params = v2.RandomResizedCrop(224).make_params([image_CHW])
    return [params[name] for name in ("top", "left", "height", "width")]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("seed", range(6))
def test_pixels_are_those_of_pillow(interpolation: str, seed: int) -> None:
    config = DataConfig(interpolation=interpolation)  # type: ignore[arg-type]
    generator = np.random.default_rng(seed)
    noise_HWC = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for pixels_HWC, largest in ((noise_HWC, 16), (smooth_image(90, 120, seed), 2)):
        image_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        view = draw_view(config, 90, 120, seed=seed, number=0, index=0)
        got = training_pixels(image_CHW, view, config, 48).permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(got - resized_crop(pixels_HWC, view, 48, interpolation))
        assert difference.mean() < 0.5 and difference.max() <= largest


def test_padded_crops_are_shifts_with_black_borders() -> None:
    config = DataConfig(crop="padded", crop_padding=3, flip_rate=0.0)
    image_CHW = torch.from_numpy(smooth_image(10, 10, 0)).permute(2, 0, 1)
    padded_CHW = torch.nn.functional.pad(image_CHW, [3, 3, 3, 3])
    tops = set()
    for index in range(100):
        view = draw_view(config, 10, 10, seed=0, number=0, index=index)
        top, left = view[:2]
        tops.add(top)
        assert view[2:] == (10, 10, 0)
        expected_CHW = padded_CHW[:, top : top + 10, left : left + 10]
        assert torch.equal(training_pixels(image_CHW, view, config, 10), expected_CHW)
    assert tops == set(range(7))


@pytest.mark.parametrize(
    ("height", "width", "size", "rate"), [(60, 90, 32, 0.875), (91, 60, 40, 0.9), (28, 28, 28, 1.0)]
)
def test_evaluation_is_resize_and_centre_crop(height: int, width: int, size: int, rate: float) -> None:
    config = DataConfig(eval_crop_rate=rate, interpolation="bilinear")
    image_CHW = torch.from_numpy(smooth_image(height, width, 0)).permute(2, 0, 1)
    expected_CHW = v2.Compose([v2.Resize(round(size / rate)), v2.CenterCrop(size)])(image_CHW)
    difference = (centre_pixels(image_CHW, config, size).int() - expected_CHW.int()).abs()
    assert difference.shape == (3, size, size) and difference.max() <= 1
    if rate == 1.0:
        assert torch.equal(centre_pixels(image_CHW, config, size), image_CHW)
