"""Recomputation around a whole SReT: the same bits with drop path, permutations and bf16 autocast."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sret_scale.memory import SCHEDULES, MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReTConfig, StackConfig, StackModel, StageConfig
from tests.backbone_configs import BACKBONES, drawn

CONFIG = SReTConfig(
    image_size=32,
    num_classes=5,
    drop_path=0.3,
    stages=(
        StageConfig(width=16, num_heads=2, num_blocks=2, num_loops=3, groups=(4, 2)),
        StageConfig(width=32, num_heads=2, num_blocks=3, num_loops=2, groups=(2, 1), projections="per_loop"),
    ),
)

FIXED_SCHEDULES = [name for name in SCHEDULES if name != "planned"]


MODELS: dict[str, StackConfig] = {"sret": CONFIG, **BACKBONES}


def make_model(config: StackConfig = CONFIG) -> StackModel:
    return drawn(config).train()


def gradients(model: StackModel, *, autocast: bool, micro_steps: int = 2) -> dict[str, Tensor]:
    """Gradients accumulated over micro-steps, each with its own noise, clipped as in training."""
    model.zero_grad()
    for micro_step in range(micro_steps):
        images = torch.randn(model.config.example(3).shape, generator=torch.Generator().manual_seed(micro_step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images, Noise(permutation_seed=micro_step, sample_seed=100 + micro_step))
        logits.float().square().sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.lengthy
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", FIXED_SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_a_model_are_unchanged_bit_for_bit(kind: str, schedule: str, autocast: bool) -> None:
    plain, model = make_model(MODELS[kind]), make_model(MODELS[kind])
    apply_recomputation(model, MemoryConfig(schedule=schedule, is_checked=True), repeats_norms=schedule != "none")
    expected, got = gradients(plain, autocast=autocast), gradients(model, autocast=autocast)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.lengthy
@pytest.mark.parametrize("kind", MODELS)
def test_weights_after_training_steps_are_unchanged_bit_for_bit(kind: str) -> None:
    models = [make_model(MODELS[kind]), make_model(MODELS[kind])]
    apply_recomputation(models[1], MemoryConfig(schedule="binomial", slots=2))
    averages = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        for _ in range(3):
            gradients(model, autocast=True)
            optimizer.step()
            average.update_parameters(model)
        averages.append(average)
    for a, b in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_is_unchanged(kind: str) -> None:
    plain, model = make_model(MODELS[kind]).eval(), make_model(MODELS[kind]).eval()
    apply_recomputation(model, MemoryConfig(schedule="nested"))
    images = torch.randn(MODELS[kind].example(2).shape)
    with torch.no_grad():
        assert torch.equal(plain(images), model(images))


def test_permutations_from_the_global_generator_are_run_again_alike() -> None:
    """The reference's permutations come from the global generator, but they are drawn once a pass: re-runs agree."""
    plain, model = (make_model(replace(CONFIG, permutation="random")) for _ in range(2))
    apply_recomputation(model, MemoryConfig(schedule="binomial", slots=1, is_checked=True))
    found = []
    for network in (plain, model):
        torch.manual_seed(1)
        found.append(gradients(network, autocast=False))
    expected, got = found
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
