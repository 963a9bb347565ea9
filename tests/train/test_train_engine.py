"""The engine on two gloo ranks: every ZeRO stage against a plain PyTorch loop, and a resume that changes no bit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sret_scale.model import Noise, SReT
from sret_scale.model.vision.stem import Stem
from sret_scale.runs.checkpoint import list_checkpoints, read_tensors, verify_checkpoint
from sret_scale.train.engine.engine import Engine
from sret_scale.train.optim import build_optimizer, set_rates
from tests.ranks.engine_ranks import ACCUMULATION, DS_CONFIGS, OPTIM, RATE, STEPS, batch, without_onednn
from tests.runs import run_two_ranks
from tests.tiny import TINY_MODEL

pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left for every DeepSpeed configuration."""
    folder = tmp_path_factory.mktemp("engine")
    run_two_ranks("tests.ranks.engine_ranks", folder)
    return folder


@pytest.mark.parametrize("what", ["weights", "optimizer", "ema"])
@pytest.mark.parametrize("ds_config", DS_CONFIGS)
def test_five_steps_and_five_more_after_a_load_are_ten_steps_bit_for_bit(
    folder: Path, ds_config: str, what: str
) -> None:
    straight = load_file(folder / f"{ds_config}.straight.{what}.safetensors")
    resumed = load_file(folder / f"{ds_config}.resumed.{what}.safetensors")
    assert straight.keys() == resumed.keys() and straight
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


@pytest.mark.parametrize("what", ["weights", "optimizer"])
@pytest.mark.parametrize("ds_config", DS_CONFIGS)
def test_a_save_beside_the_training_has_the_bits_of_its_step(folder: Path, ds_config: str, what: str) -> None:
    (checkpoint,) = list_checkpoints(folder / ds_config)
    verify_checkpoint(checkpoint)
    saved, straight = read_tensors(checkpoint, what), load_file(folder / f"{ds_config}.straight.{what}.safetensors")
    assert saved.keys() == straight.keys()
    assert [name for name in straight if not torch.equal(straight[name], saved[name])] == []


def test_a_save_that_fails_is_the_same_error_on_every_rank(folder: Path) -> None:
    texts = [(folder / f"refused.{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1] and "cannot save checkpoint" in texts[0] and str(folder / "blocked") in texts[0]


def plain_loop() -> tuple[dict[str, torch.Tensor], float]:
    """The same training in one process without DeepSpeed: each rank's micro-batch in turn, gradients averaged."""
    torch.manual_seed(0)
    model = SReT(TINY_MODEL)
    optimizer = build_optimizer(model, model.parameter_tags(), OPTIM)
    norm = torch.tensor(0.0)
    for step in range(STEPS):
        set_rates(optimizer.param_groups, RATE / (1 + step))
        optimizer.zero_grad()
        before = {name: value.clone() for name, value in model.named_buffers()}
        after: list[dict[str, torch.Tensor]] = []
        for rank in range(2):
            # Each rank has its own running statistics until they are averaged after the update.
            model.load_state_dict({**model.state_dict(), **before})
            for micro_step in range(ACCUMULATION):
                images, labels = batch(step, micro_step, rank, 2)
                logits = model(images, Noise(permutation_seed=step, sample_seed=step + rank))
                (F.cross_entropy(logits, labels) / (2 * ACCUMULATION)).backward()
            after.append({name: value.clone() for name, value in model.named_buffers()})
        mean = {
            name: (after[0][name] + after[1][name]) / 2 if after[0][name].is_floating_point() else after[0][name]
            for name in before
        }
        model.load_state_dict({**model.state_dict(), **mean})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}, float(norm)


@pytest.mark.parametrize("ds_config", ["zero0", "zero1", "zero2", "zero3"])
def test_every_zero_stage_is_the_plain_loop(folder: Path, ds_config: str) -> None:
    with without_onednn():
        expected, norm = plain_loop()
    got = load_file(folder / f"{ds_config}.straight.weights.safetensors")
    assert got.keys() == expected.keys()
    # The largest seen is 1.2e-7.
    assert max(float((got[name].double() - value.double()).abs().max()) for name, value in expected.items()) <= 1e-6
    norms = load_file(folder / f"{ds_config}.norms.safetensors")["grad_norm"]
    torch.testing.assert_close(norms, torch.tensor([norm, norm]), rtol=1e-5, atol=0)


def test_synchronised_batch_norm_on_two_ranks_is_that_of_the_whole_batch(folder: Path) -> None:
    torch.manual_seed(0)
    stem = Stem(replace(TINY_MODEL, stem_norm="sync_batch"))
    images = torch.cat([batch(0, 0, rank, 2)[0] for rank in range(2)])
    outputs = stem(images)
    outputs.square().sum().backward()
    ranks = [load_file(folder / f"stem.{rank}.safetensors") for rank in range(2)]
    torch.testing.assert_close(torch.cat([rank["outputs"] for rank in ranks]), outputs.detach(), rtol=1e-4, atol=1e-5)
    for name, value in stem.named_parameters():
        if value.grad is not None and not (".convs." in f".{name}" and name.endswith("bias")):
            torch.testing.assert_close(ranks[0][name], value.grad, rtol=1e-3, atol=1e-3)
    for name, buffer in stem.named_buffers():
        torch.testing.assert_close(ranks[0][name], buffer, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_stays_close_to_fp32(folder: Path) -> None:
    fp32 = load_file(folder / "zero1.straight.weights.safetensors")
    bf16 = load_file(folder / "zero1_autocast.straight.weights.safetensors")
    torch.manual_seed(0)
    start = SReT(TINY_MODEL).state_dict()
    trained = [name for name, _ in SReT(TINY_MODEL).named_parameters() if not name.endswith("bias")]
    apart = sum(float((fp32[name] - bf16[name]).square().sum()) for name in trained)
    moved = sum(float((fp32[name] - start[name]).square().sum()) for name in trained)
    # Sums of squares: the end is off by 8.3 % of the way.
    assert 0 < apart < 0.1**2 * moved


def test_moments_of_another_update_rule_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    engine = SimpleNamespace(
        _client_optimizer=SimpleNamespace(missed={}),
        _trained_parameters=lambda: iter([("head.weight", parameter)]),
        _moments=lambda _name: ("exp_avg", "exp_avg_sq"),
    )
    state = {"step": torch.tensor(3.0), "momentum_buffer.head.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"lacks exp_avg\.head\.weight \(and 1 more\).*another optim\.optimizer"):
        Engine.load_optimizer_state(engine, state, {})  # type: ignore[arg-type]


def test_moments_of_another_shape_are_refused_although_they_could_be_spread_out() -> None:
    engine = SimpleNamespace(
        _client_optimizer=SimpleNamespace(missed={}),
        _trained_parameters=lambda: iter([("head.weight", torch.nn.Parameter(torch.zeros(2)))]),
        _moments=lambda _name: ("exp_avg",),
        _create_optimizer_entries=lambda _step: None,
        zero_stage=0,
    )
    state = {"step": torch.tensor(3.0), "exp_avg.head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"exp_avg\.head\.weight: expected \(2,\), got \(1,\)"):
        Engine.load_optimizer_state(engine, state, {})  # type: ignore[arg-type]
    del state["step"]
    with pytest.raises(ValueError, match="lacks step"):
        Engine.load_optimizer_state(engine, state, {})  # type: ignore[arg-type]
