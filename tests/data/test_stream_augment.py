"""Batch augmentation: a pure function of batch and seed that leaves torch's generators alone."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipelines.image.augment import AugmentConfig, BatchAugment, normalise, normalise_
from data_pipelines.image.pixel_operations import apply_operations_
from data_pipelines.image.policies import POLICIES, randaugment_layer
from data_pipelines.image.torchvision_door import v2

G = v2.functional

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


def apply_operations(
    images_BCHW: torch.Tensor, names: list[str], strengths: "np.ndarray[Any, Any]", fill: tuple[int, ...]
) -> torch.Tensor:
    result_BCHW = images_BCHW.clone()
    apply_operations_(result_BCHW, names, strengths, fill)
    return result_BCHW


HERE = (40, 56)
PHOTOS_BCHW = torch.randint(0, 256, (4, 3, *HERE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
# Smooth, so that a rounding of a place moves no grey level by more than one.
PHOTOS_BCHW = torch.nn.functional.interpolate(PHOTOS_BCHW[..., ::8, ::8].float(), HERE, mode="bilinear").to(torch.uint8)
PHOTOS_BCHW[3] = 77
BILINEAR = v2.InterpolationMode.BILINEAR


def shear(image_CHW: torch.Tensor, degrees: list[float]) -> torch.Tensor:
    return G.affine(image_CHW, 0.0, [0, 0], 1.0, degrees, interpolation=BILINEAR, center=[0, 0])


def angle(strength: float) -> float:
    return math.degrees(math.atan(strength))


TWINS: dict[str, tuple[tuple[float, ...], Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "shear_x": ((0.2, -0.3), lambda x, s: shear(x, [angle(s), 0.0])),
    "shear_y": ((0.2, -0.3), lambda x, s: shear(x, [0.0, angle(s)])),
    "translate_x": ((5, -11), lambda x, s: G.affine(x, 0.0, [int(s), 0], 1.0, [0.0], interpolation=BILINEAR)),
    "translate_y": ((5, -11), lambda x, s: G.affine(x, 0.0, [0, int(s)], 1.0, [0.0], interpolation=BILINEAR)),
    "rotate": ((9, -30), lambda x, s: G.rotate(x, s, interpolation=BILINEAR)),
    "brightness": ((0.3, 1.7), G.adjust_brightness),
    "color": ((0.3, 1.7), G.adjust_saturation),
    "contrast": ((0.3, 1.7), G.adjust_contrast),
    "sharpness": ((0.3, 1.7), G.adjust_sharpness),
    "posterize": ((1, 4, 8), lambda x, s: G.posterize(x, int(s))),
    "solarize": ((0, 100.5, 255, 256), lambda x, s: G.solarize(x, s) if s < 256 else x),
    "autocontrast": ((0,), lambda x, _: G.autocontrast(x)),
    "equalize": ((0,), lambda x, _: G.equalize(x)),
    "grey": ((0,), lambda x, _: G.rgb_to_grayscale(x, 3)),
    "blur": ((0.1, 1.3, 2.0), lambda x, s: G.gaussian_blur(x, [13, 13], [s, s])),
}


@pytest.mark.parametrize("name", TWINS)
def test_operations_on_a_batch_are_torchvisions_on_single_images(name: str) -> None:
    strengths, twin = TWINS[name]
    for images_BCHW in (PHOTOS_BCHW, IMAGES_BCHW):
        rows = [strengths[row % len(strengths)] for row in range(len(images_BCHW))]
        found_BCHW = apply_operations(images_BCHW, [name] * len(rows), np.array(rows, dtype=float), (0, 0, 0))
        for found_CHW, image_CHW, strength in zip(found_BCHW, images_BCHW, rows, strict=True):
            assert (found_CHW.int() - twin(image_CHW, float(strength)).int()).abs().max() <= 1


@pytest.mark.parametrize("threshold", [0, 1, 128, 254, 255, 256])
def test_solarize_is_pillows_as_timm_calls_it(threshold: int) -> None:
    """On every grey level; at 256, which timm's weakest is, nothing is inverted."""
    levels_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images_BCHW = torch.from_numpy(levels_HW).expand(1, 3, 16, 16)
    found_BCHW = apply_operations(images_BCHW, ["solarize"], np.array([float(threshold)]), (0, 0, 0))
    expected_HW = np.asarray(ImageOps.solarize(Image.fromarray(levels_HW), threshold))
    assert torch.equal(found_BCHW, torch.from_numpy(expected_HW.copy()).expand_as(found_BCHW))


def test_solarize_add_is_timms() -> None:
    found_BCHW = apply_operations(IMAGES_BCHW, ["solarize_add"] * 6, np.full(6, 99.0), (0, 0, 0))
    expected_BCHW = torch.where(IMAGES_BCHW < 128, (IMAGES_BCHW.int() + 99).clamp(max=255), IMAGES_BCHW.int())
    assert torch.equal(found_BCHW.int(), expected_BCHW)


def test_what_lies_beyond_an_edge_has_the_colour_that_was_asked_for() -> None:
    images_BCHW = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    found_BCHW = apply_operations(images_BCHW, ["translate_x", "identity"], np.array([3.0, 0.0]), (124, 116, 104))
    assert found_BCHW[0, :, 2, 0].tolist() == [124, 116, 104] and bool((found_BCHW[0, :, :, 3:] == 200).all())
    assert torch.equal(found_BCHW[1], images_BCHW[1])


def drawn(policy: str, magnitude: float = 9) -> dict[str, list[float]]:
    """The strengths of 4,000 draws by operation, for images of 40 x 56 pixels."""
    uniforms_BU = np.random.default_rng(0).random((4000, 5))
    layer = randaugment_layer(policy, uniforms_BU, magnitude, *HERE)
    found: dict[str, list[float]] = {}
    for name, strength in zip(layer.names, layer.strengths.tolist(), strict=True):
        found.setdefault(name, []).append(strength)
    return found


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_the_policy_of_torchvision_draws_its_operations_and_strengths(magnitude: int) -> None:
    found, theirs = drawn("torchvision", magnitude), v2.RandAugment(magnitude=magnitude)
    spaces = theirs._AUGMENTATION_SPACE
    assert sorted(found) == sorted(re.sub(r"(?<=[a-z])(?=[XY])", "_", name).lower() for name in spaces)
    for name, (magnitudes, is_signed) in spaces.items():
        ours = found[re.sub(r"(?<=[a-z])(?=[XY])", "_", name).lower()]
        assert 4000 / 14 * 0.8 < len(ours) < 4000 / 14 * 1.2
        bins = magnitudes(31, *HERE)
        if bins is None:
            continue
        strength = float(bins[magnitude])
        base = 1.0 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0.0
        expected = {base + sign * strength for sign in ((-1, 1) if is_signed else (1,))}
        if name.startswith("Translate"):
            expected = {float(int(value)) for value in expected}
        if name == "Solarize":
            expected = {255 * strength}
        assert sorted(set(ours)) == pytest.approx(sorted(expected), abs=1e-4), name


def test_the_policy_of_timm_draws_its_operations_and_strengths() -> None:
    """Against what timm's own functions make of a level, which is normal around 9 with a deviation of 0.5."""
    found = drawn("timm")
    assert 0.45 < len(found.pop("identity")) / 4000 < 0.55
    assert not found.keys() - set(POLICIES["timm"].names)
    assert np.mean(np.abs(found["rotate"])) == pytest.approx(27, abs=0.3)
    assert np.std(np.abs(found["rotate"])) == pytest.approx(1.5, abs=0.3) and max(found["rotate"]) <= 30
    assert {round(abs(value - 1), 1) for value in found["color"]} <= {0.6, 0.7, 0.8, 0.9} and min(found["color"]) >= 0.1
    assert np.mean(np.abs(found["translate_x"])) == pytest.approx(0.45 * 0.9 * 56, abs=0.5)
    assert np.mean(np.abs(found["translate_y"])) == pytest.approx(0.45 * 0.9 * 40, abs=0.5)
    assert set(found["posterize"]) <= {0.0, 1.0} and set(found["solarize_add"]) <= set(range(80, 111))
    # Half of these are inversions.
    assert 0.4 < np.mean(np.array(found["solarize"]) == 0) < 0.6


def test_a_sample_is_the_same_in_every_batch() -> None:
    config = replace(AugmentConfig(erase_rate=1.0, color_jitter=0.3, three_augment_rate=0.5), mix_rate=0.0)
    augment, keys = BatchAugment(config, 5), [(7, 0, row) for row in range(6)]
    whole_BCHW, _ = augment(IMAGES_BCHW, LABELS_B, seed=0, keys=keys)
    for rows in (slice(0, 2), slice(2, 6), slice(5, 6)):
        part_BCHW, _ = augment(IMAGES_BCHW[rows], LABELS_B[rows], seed=rows.start, keys=keys[rows])
        assert torch.equal(part_BCHW, whole_BCHW[rows])
    other_BCHW, _ = augment(IMAGES_BCHW, LABELS_B, seed=0, keys=[(7, 1, row) for row in range(6)])
    assert all(not torch.equal(one, other) for one, other in zip(whole_BCHW, other_BCHW, strict=True))


def test_erased_boxes_have_torchvisions_shares_and_noise() -> None:
    images_BCHW = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    labels_B = torch.zeros(400, dtype=torch.int64)
    unit_BCHW, _ = BatchAugment(replace(OFF, erase_rate=0.25), 5)(images_BCHW, labels_B, seed=0)
    shares_B = (unit_BCHW > 0).any(1).float().mean((1, 2))
    erased_B = shares_B > 0
    assert 70 < int(erased_B.sum()) < 130
    assert float(shares_B[erased_B].min()) > 0.015 and float(shares_B[erased_B].max()) < 0.36
    assert float(shares_B[erased_B].mean()) == pytest.approx(0.17, abs=0.04)
    noise = unit_BCHW[unit_BCHW > 0]
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02) and float(noise.std()) == pytest.approx(0.24, abs=0.02)


def test_normalise() -> None:
    unit_BCHW = torch.rand(2, 3, 4, 4)
    got_BCHW = normalise(unit_BCHW, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert torch.allclose(got_BCHW[:, 1], (unit_BCHW[:, 1] - 0.4) / 0.25)
    in_place_BCHW = unit_BCHW.clone()
    assert normalise_(in_place_BCHW, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)) is in_place_BCHW
    assert torch.equal(in_place_BCHW, got_BCHW)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"augment.erase_rate: expected between 0 and 1, got 1.5"):
        AugmentConfig(erase_rate=1.5)
