"""The fault suite in its short form; `python -m checks.faults` is the full one."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from checks.faults import crashes_while_saving, mutations, state_of
from sret_scale.runs.checkpoint import save_checkpoint


@pytest.mark.multi_process
@pytest.mark.skipif(shutil.which("strace") is None, reason="faults are injected by strace, which is not installed")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO"])
def test_a_crash_at_every_file_system_call_of_a_save_leaves_the_old_or_the_new_state(
    tmp_path: Path, fault: str
) -> None:
    outcome = crashes_while_saving(tmp_path, random.Random(1), None, fault)
    assert outcome.num_survived == outcome.num_tried > 30


def test_mutations_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    outcome = mutations(tmp_path, random.Random(1), 25)
    assert (outcome.num_survived, outcome.num_tried) == (25, 25)


@pytest.mark.parametrize("stale", ["weights", "optimizer", "images"])
def test_a_checkpoint_with_a_part_of_another_step_is_told_from_a_whole_one(tmp_path: Path, stale: str) -> None:
    def save(folder: Path, steps: dict[str, int]) -> None:
        sizes = {"weights": (64, 64), "optimizer": (64,)}
        tensors = {name: {"a": torch.full(size, float(steps[name]))} for name, size in sizes.items()}
        save_checkpoint(folder, step=2, tensors=tensors, state={"images": steps["images"]})

    whole = {"weights": 2, "optimizer": 2, "images": 2}
    save(tmp_path / "whole", whole)
    assert state_of(tmp_path / "whole") == 2
    save(tmp_path / "torn", {**whole, stale: 1})
    with pytest.raises(AssertionError):
        state_of(tmp_path / "torn")
