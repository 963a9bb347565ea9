"""Update rules, classes of parameters and left-out updates on two gloo ranks, against plain torch in one process."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sret_scale.config.precision import GROWTH_STEPS, LossScale
from tests.reference.update import trained, trained_fp32
from tests.runs import run_two_ranks
from tests.train.update_toy import CASES as UNDER_ZERO
from tests.train.update_toy import FP16_STAGES, FP16_STEPS

CASES = [(rule, stage) for rule, stages in UNDER_ZERO.items() for stage in stages]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left for every rule and ZeRO stage."""
    folder = tmp_path_factory.mktemp("update")
    run_two_ranks("tests.ranks.update_ranks", folder)
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize(("rule", "stage"), CASES)
def test_classes_unused_parameters_and_left_out_updates_are_those_of_plain_torch(
    folder: Path, rule: str, stage: int | str
) -> None:
    got = load_file(folder / f"{rule}.{stage}.straight.safetensors")
    for name, value in trained(rule).items():
        torch.testing.assert_close(
            got[f"weights/{name}"], value, rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name)
        )


@pytest.mark.multi_process
@pytest.mark.parametrize(("rule", "stage"), CASES)
def test_a_resume_among_left_out_updates_changes_no_bit(folder: Path, rule: str, stage: int | str) -> None:
    straight = load_file(folder / f"{rule}.{stage}.straight.safetensors")
    resumed = load_file(folder / f"{rule}.{stage}.resumed.safetensors")
    assert straight.keys() == resumed.keys() and any(name.startswith("optimizer/exp_avg") for name in straight)
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


@pytest.mark.multi_process
@pytest.mark.parametrize("stage", FP16_STAGES)
def test_fp16_finds_its_loss_scale_alike_on_all_ranks_and_trains_as_fp32(folder: Path, stage: int) -> None:
    ranks = [load_file(folder / f"fp16.{stage}.{rank}.safetensors") for rank in range(2)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    num_overflows = int(ranks[0]["num_overflows"])
    assert 0 < num_overflows < FP16_STEPS - 4
    for name, value in trained_fp32(num_overflows).items():
        torch.testing.assert_close(ranks[0][name], value, rtol=0.02, atol=2e-3, msg=partial("{}: {}".format, name))


def test_loss_scale_halves_at_once_and_doubles_after_a_while() -> None:
    scale = LossScale(value=8.0)
    scale.update(False)
    assert scale.value == 4.0
    for _ in range(GROWTH_STEPS - 1):
        scale.update(True)
    resumed = LossScale()
    resumed.restore(scale.to_json())
    assert resumed.value == 4.0
    resumed.update(True)
    assert (resumed.value, resumed.num_good) == (8.0, 0)
    for _ in range(9):
        resumed.update(False)
    assert resumed.value == 1.0
