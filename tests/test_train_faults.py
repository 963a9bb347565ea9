"""The fault suite in its short form; `python -m tests.faults` is the full one."""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults import crashes_while_saving, mutations


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
