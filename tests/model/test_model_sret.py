"""The model as a whole: starts near chance, learns, repeats itself, and tells what is wrong with a spec."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.model import Application, Noise, SReT, SReTConfig, StageConfig, preset
from tests.model.typed_stages import stages_of

TINY = SReTConfig(
    stages=(
        StageConfig(width=16, num_heads=2, num_blocks=1, num_loops=3, groups=(4, 2), mlp_ratio=2.0),
        StageConfig(width=32, num_heads=2, num_blocks=2, num_loops=2, groups=(2, 2), mlp_ratio=2.0),
    ),
    image_size=32,
    num_classes=10,
    stem_strides=(2, 2, 1),
    drop_path=0.3,
)
IMAGES_BCHW = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS_B = torch.tensor([1, 4, 9])


def tiny_model(config: SReTConfig = TINY) -> SReT:
    torch.manual_seed(0)
    return SReT(config)


@pytest.mark.parametrize("name", ["demo_student_108", "demo_control_20", "demo_teacher"])
def test_loss_at_init_is_near_chance(name: str) -> None:
    torch.manual_seed(0)
    images_BCHW = torch.randn(8, 3, 28, 28)
    loss = F.cross_entropy(SReT(preset(name))(images_BCHW, Noise(0, 0)), torch.arange(8))
    assert abs(float(loss.detach()) - math.log(10)) < 0.5


@pytest.mark.lengthy
def test_one_batch_can_be_overfitted() -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        loss = F.cross_entropy(model(IMAGES_BCHW, Noise(step, step)), LABELS_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2


def test_evaluation_is_deterministic_and_random_permutations_are_not() -> None:
    model = tiny_model().eval()
    assert torch.equal(model(IMAGES_BCHW), model(IMAGES_BCHW))
    drawn = tiny_model(replace(TINY, permutation="random")).eval()
    assert not torch.equal(drawn(IMAGES_BCHW), drawn(IMAGES_BCHW))


def test_training_randomness_is_a_function_of_the_two_seeds() -> None:
    model = tiny_model()
    model.stem.eval()
    first = model(IMAGES_BCHW, Noise(permutation_seed=1, sample_seed=2))
    assert torch.equal(first, model(IMAGES_BCHW, Noise(permutation_seed=1, sample_seed=2)))
    assert not torch.equal(first, model(IMAGES_BCHW, Noise(permutation_seed=3, sample_seed=2)))
    assert not torch.equal(first, model(IMAGES_BCHW, Noise(permutation_seed=1, sample_seed=3)))


def test_autocast_keeps_the_stream_in_fp32() -> None:
    model = tiny_model()
    seen = []

    def watch(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        for application in applications:
            x_BND = application(x_BND)
            seen.append((x_BND.dtype, torch.is_autocast_cache_enabled()))
        return x_BND

    for stage in stages_of(model):
        stage.run_chain = watch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IMAGES_BCHW, Noise(0, 0)).float().sum().backward()
    assert len(seen) == TINY.num_applications
    assert {dtype for dtype, _ in seen} == {torch.float32}


def test_an_application_knows_its_parameters() -> None:
    model = tiny_model()
    used: list[Application] = []

    def note(applications: Sequence[Application], x_BND: Tensor) -> Tensor:
        used.extend(applications)
        return x_BND

    stages_of(model)[0].run_chain = note
    model(IMAGES_BCHW)
    assert len(used) == TINY.stages[0].num_blocks * TINY.stages[0].num_loops
    for application in used:
        expected = {*application.block.parameters(), *application.projection.parameters()}
        assert set(application.parameters()) == expected


def test_parameter_tags_cover_every_parameter() -> None:
    model = tiny_model()
    tags = model.parameter_tags()
    assert set(tags) == {name for name, _ in model.named_parameters()}
    assert tags["stages.0.blocks.0.attention.qkv.weight"].kind == "tied"
    assert tags["stages.0.projections.2.feed_forward.fc1.weight"].kind == "projection"
    assert tags["stages.0.blocks.0.attention.qkv.weight"].decay
    assert not any(tags[name].decay for name, value in model.named_parameters() if value.ndim == 1)
    assert not tags["position"].decay


def test_the_skip_is_frozen_beyond_two_loops_and_may_learn_slowly() -> None:
    model = tiny_model()
    assert model.stages[0].blocks[0].residual1.alpha is None
    assert model.stages[1].blocks[0].residual1.alpha is not None
    slow = replace(TINY, stages=(replace(TINY.stages[0], skip="slow"), TINY.stages[1]))
    assert tiny_model(slow).parameter_tags()["stages.0.blocks.0.residual1.alpha"].lr_scale == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": (3,)}, "3 groups do not divide 64 tokens"),
        ({"groups": ()}, "groups is empty"),
        ({"num_loops": 0}, "num_loops must be a whole number of at least 1, got 0"),
        ({"num_heads": 3}, "width 16 cannot be cut into 3 heads"),
        ({"projections": "shared"}, "projections must be one of per_application"),
        ({"mlp_ratio": 0.01}, "leaves no hidden channel"),
    ],
)
def test_an_impossible_spec_is_refused_with_its_numbers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, stages=(replace(TINY.stages[0], **change), TINY.stages[1]))


def test_a_wrong_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of shape \(batch, 3, 32, 32\), got \(3, 3, 64, 64\)"):
        tiny_model()(torch.zeros(3, 3, 64, 64))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean sret_t_108"):
        preset("sret_t108")
