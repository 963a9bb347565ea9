"""A training step on CUDA tensors touches the host nowhere: shown without a GPU, on tensors without data.

What this cannot show: that kernels exist for these shapes and are right, that streams are in order, and any speed.
"""

import json
import shutil
from typing import Any

import pytest
import torch

from tests.train import fake_gpu
from tests.train.gpu_cases import CASES

pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a torch with CUDA has a device of its own to register"),
]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case noted; one process runs them all."""
    result = fake_gpu.start("tests.train.gpu_cases", fake_gpu.build(tmp_path_factory.mktemp("fake_gpu")))
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [note["case"] for note in found] == list(CASES), result.stderr[-2000:]
    return {note["case"]: note for note in found}


@pytest.mark.parametrize("case", [name for name in CASES if name != "hidden waits"])
def test_the_host_waits_for_nothing_and_devices_do_not_mix(case: str, notes: dict[str, dict[str, Any]]) -> None:
    note = notes[case]
    assert note["error"] is None, note["error"]
    assert note["waits"] == {}
    # Every draw is from a generator that was seeded for it, which a restart and a re-run repeat.
    assert note["draws"] == {}


def test_a_hidden_wait_is_noticed(notes: dict[str, dict[str, Any]]) -> None:
    assert notes["hidden waits"]["error"] is None
    assert sum(notes["hidden waits"]["waits"].values()) == 6
