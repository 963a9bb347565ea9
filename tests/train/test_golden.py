"""Small runs give the numbers of `tests/golden/runs.json`: bit for bit where it was recorded, closely elsewhere."""

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_shards
from tests.train.golden_runs import FILE, NUM_STEPS, RANKS, machine, recorded, train

pytestmark = pytest.mark.multi_process
TOLERANCE = 1e-5
"""Relative, of losses on another processor or torch; AVX2's kernels in the place of AVX-512's move them by 2.5e-7."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("golden") / "shards")


@pytest.mark.parametrize("name", RANKS)
def test_a_small_run_has_the_losses_and_weights_that_were_recorded(name: str, shards: Path) -> None:
    expected = dict(recorded())[name]
    found = train(name, shards)
    assert len(found.losses) == len(expected.losses) == NUM_STEPS
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    if machine() == json.loads(FILE.read_text())["machine"]:
        assert found == expected
