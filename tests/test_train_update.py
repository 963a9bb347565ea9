"""Update rules, classes of parameters and left-out updates on two gloo ranks, against plain torch in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reference.update import trained
from tests.runs import run_two_ranks
from tests.update_toy import STAGES

CASES = [(rule, stage) for rule in ("adamw", "lamb") for stage in STAGES] + [("muon", 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left for every rule and ZeRO stage."""
    folder = tmp_path_factory.mktemp("update")
    run_two_ranks("tests.update_ranks", folder)
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize(("rule", "stage"), CASES)
def test_classes_unused_parameters_and_left_out_updates_are_those_of_plain_torch(
    folder: Path, rule: str, stage: int
) -> None:
    got = load_file(folder / f"{rule}.{stage}.straight.safetensors")
    for name, value in trained(rule).items():
        torch.testing.assert_close(
            got[f"weights/{name}"], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.multi_process
@pytest.mark.parametrize(("rule", "stage"), CASES)
def test_a_resume_among_left_out_updates_changes_no_bit(folder: Path, rule: str, stage: int) -> None:
    straight = load_file(folder / f"{rule}.{stage}.straight.safetensors")
    resumed = load_file(folder / f"{rule}.{stage}.resumed.safetensors")
    assert straight.keys() == resumed.keys() and any(name.startswith("optimizer/exp_avg") for name in straight)
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
