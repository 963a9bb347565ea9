"""Views that come again: what stored soft labels rest on."""

from dataclasses import replace

import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.image.augment import AugmentConfig, BatchAugment
from data_pipelines.image.view import VIEW_VERSION, draw_view, view_number, view_settings

CONFIG = DataConfig(num_views=3, view_seed=7)


def test_epochs_see_the_views_in_turn() -> None:
    assert [view_number(CONFIG, epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    repeated = replace(CONFIG, num_views=6, num_repeats=4)
    numbers = [view_number(repeated, epoch, repeat) for epoch in range(2) for repeat in range(4)]
    assert numbers == [0, 1, 2, 3, 4, 5, 0, 1]


def test_views_of_this_version_are_these() -> None:
    """Stores on disk hold these boxes: a change here needs another VIEW_VERSION."""
    assert VIEW_VERSION == 1
    resized = [draw_view(CONFIG, 375, 500, seed=0, number=number, index=11) for number in range(3)]
    assert resized == [(34, 138, 255, 251, 1), (10, 7, 350, 459, 1), (36, 1, 295, 366, 0)]
    padded = DataConfig(crop="padded", crop_padding=4)
    assert [draw_view(padded, 28, 28, seed=3, number=number, index=0) for number in range(3)] == [
        (1, 4, 28, 28, 0),
        (2, 6, 28, 28, 1),
        (7, 8, 28, 28, 1),
    ]


def test_settings_name_what_the_crop_depends_on() -> None:
    padded = DataConfig(crop="padded")
    assert view_settings(padded) == view_settings(replace(padded, crop_scale=(0.5, 1.0)))
    assert view_settings(padded) != view_settings(replace(padded, crop_padding=2))
    assert view_settings(CONFIG) != view_settings(replace(CONFIG, crop_scale=(0.5, 1.0)))


def test_number_of_views_is_checked() -> None:
    with pytest.raises(ValueError, match=r"data\.num_views: expected at least 1, or null, got 0"):
        DataConfig(num_views=0)


@pytest.mark.parametrize("mode", ["mixup_alpha", "cutmix_alpha"])
def test_probabilities_are_mixed_like_one_hot_labels(mode: str) -> None:
    off = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)
    augment = BatchAugment(replace(off, **{mode: 1.0}), 4)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    table = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    pixels, target = augment(images, labels, seed=5)
    same_pixels, mixed = augment(images, table[labels], seed=5)
    assert torch.equal(pixels, same_pixels) and target.max() < 1
    torch.testing.assert_close(mixed, target @ table)
