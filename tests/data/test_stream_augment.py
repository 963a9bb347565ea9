"""Batch augmentation: a pure function of batch and seed that leaves torch's generators alone."""

from dataclasses import replace

import pytest
import torch

from data_pipelines.image.augment import AugmentConfig, BatchAugment, normalise, normalise_

OFF = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)
IMAGES_BCHW = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS_B = torch.tensor([0, 1, 2, 3, 4, 0])


def _augment(config: AugmentConfig, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return BatchAugment(config, 5)(IMAGES_BCHW, LABELS_B, seed=seed)


def test_nothing_switched_on_changes_nothing() -> None:
    unit_BCHW, target_BC = _augment(OFF)
    assert torch.equal(unit_BCHW, IMAGES_BCHW.float() / 255)
    assert torch.equal(target_BC, torch.nn.functional.one_hot(LABELS_B, 5).float())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"randaugment_ops": 2},
        {"three_augment_rate": 1.0},
        {"color_jitter": 0.4},
        {"erase_rate": 1.0},
        {"mixup_alpha": 0.8},
        {"cutmix_alpha": 1.0},
    ],
)
def test_the_seed_decides_everything(change: dict[str, float]) -> None:
    config = replace(OFF, **change) if change else AugmentConfig()  # type: ignore[arg-type]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = _augment(config, 3), _augment(config, 3), _augment(config, 4)
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(first[0], other[0])
    unit_BCHW, target_BC = first
    assert unit_BCHW.dtype == torch.float32 and unit_BCHW.shape == IMAGES_BCHW.shape
    assert unit_BCHW.min() >= 0 and unit_BCHW.max() <= 1
    assert torch.allclose(target_BC.sum(1), torch.ones(6)) and target_BC.dtype == torch.float32
    assert not torch.equal(unit_BCHW, IMAGES_BCHW.float() / 255)


def test_three_augment_greys_solarises_or_blurs_a_third_each() -> None:
    augment = BatchAugment(replace(OFF, three_augment_rate=1.0), 5)
    plain_BCHW = IMAGES_BCHW.float() / 255
    grey = solarised = blurred = 0
    for seed in range(50):
        unit_BCHW, _ = augment(IMAGES_BCHW, LABELS_B, seed=seed)
        for plain_CHW, unit_CHW in zip(plain_BCHW, unit_BCHW, strict=True):
            inverted_CHW = torch.where(plain_CHW >= 128 / 255, 1 - plain_CHW, plain_CHW)
            if torch.equal(unit_CHW[0], unit_CHW[1]) and torch.equal(unit_CHW[0], unit_CHW[2]):
                grey += 1
            elif torch.allclose(unit_CHW, inverted_CHW, atol=1e-6):
                solarised += 1
            else:
                blurred += 1
                assert float(unit_CHW.std()) <= float(plain_CHW.std())
                assert float(unit_CHW.mean()) == pytest.approx(float(plain_CHW.mean()), abs=0.06)
    assert all(75 <= count <= 125 for count in (grey, solarised, blurred))


def test_three_augment_happens_at_the_declared_rate() -> None:
    augment = BatchAugment(replace(OFF, three_augment_rate=0.25), 5)
    plain_BCHW = IMAGES_BCHW.float() / 255
    batches = [augment(IMAGES_BCHW, LABELS_B, seed=seed)[0] for seed in range(50)]
    num_changed = sum(int((batch != plain_BCHW).flatten(1).any(1).sum()) for batch in batches)
    assert 45 <= num_changed <= 105


def test_mixup_mixes_targets_as_pixels() -> None:
    unit_BCHW, target_BC = _augment(replace(OFF, mixup_alpha=0.8))
    share = float(target_BC[1, 1])
    plain_BCHW = IMAGES_BCHW.float() / 255
    expected_BCHW = share * plain_BCHW + (1 - share) * plain_BCHW.roll(1, 0)
    assert torch.allclose(unit_BCHW, expected_BCHW, atol=1e-6) and float(target_BC[1, 0]) == pytest.approx(1 - share)


def test_cutmix_takes_the_share_that_it_declares() -> None:
    unit_BCHW, target_BC = _augment(replace(OFF, cutmix_alpha=1.0), seed=2)
    plain_BCHW = IMAGES_BCHW.float() / 255
    kept_BHW = (unit_BCHW == plain_BCHW).all(1)
    assert kept_BHW[1].float().mean() == pytest.approx(float(target_BC[1, 1]), abs=0.01)
    assert ((unit_BCHW == plain_BCHW) | (unit_BCHW == plain_BCHW.roll(1, 0))).all()


def test_mixing_happens_at_the_declared_rate() -> None:
    config = replace(OFF, mixup_alpha=0.8, cutmix_alpha=1.0, mix_rate=0.5, cutmix_rate=0.25)
    augment = BatchAugment(config, 5)
    plain_BCHW = IMAGES_BCHW.float() / 255
    num_mixed = num_cutmix = 0
    for seed in range(400):
        unit_BCHW, _ = augment(IMAGES_BCHW, LABELS_B, seed=seed)
        is_mixed = not torch.equal(unit_BCHW, plain_BCHW)
        num_mixed += is_mixed
        num_cutmix += is_mixed and bool(((unit_BCHW == plain_BCHW) | (unit_BCHW == plain_BCHW.roll(1, 0))).all())
    # Some cutmix boxes are empty, and some mixup weights round to one.
    assert 150 <= num_mixed <= 235 and 25 <= num_cutmix <= 75


def test_samples_of_a_batch_get_their_own_operations() -> None:
    same_BCHW = IMAGES_BCHW[:1].expand(6, -1, -1, -1)
    unit_BCHW, _ = BatchAugment(replace(OFF, randaugment_ops=2, randaugment_magnitude=20), 5)(
        same_BCHW, LABELS_B, seed=0
    )
    assert len({tuple(unit_CHW.flatten().tolist()) for unit_CHW in unit_BCHW}) >= 4


def test_normalise() -> None:
    unit_BCHW = torch.rand(2, 3, 4, 4)
    got_BCHW = normalise(unit_BCHW, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert torch.allclose(got_BCHW[:, 1], (unit_BCHW[:, 1] - 0.4) / 0.25)
    in_place_BCHW = unit_BCHW.clone()
    assert normalise_(in_place_BCHW, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)) is in_place_BCHW
    assert torch.equal(in_place_BCHW, got_BCHW)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"augment.erase_rate: expected a share between 0 and 1, got 1.5"):
        AugmentConfig(erase_rate=1.5)
