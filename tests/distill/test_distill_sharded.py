"""A teacher larger than what one rank may hold, cut over two gloo ranks, answers like a whole one."""

import json
from pathlib import Path

import pytest

from tests.runs import run_two_ranks

# Two ranks hold half of the weights each; one layer of ten is gathered at a time.
CAP_RATIO = 0.7


@pytest.mark.multi_process
def test_sharded_teacher_fits_under_a_cap_and_answers_bit_for_bit(tmp_path: Path) -> None:
    run_two_ranks("tests.ranks.teacher_ranks", tmp_path / "rank")
    for rank in range(2):
        for result in json.loads((tmp_path / f"rank.{rank}").read_text()).values():
            cap_bytes = CAP_RATIO * result["total_bytes"]
            assert result["is_equal"] and result["gradient"] > 0
            assert result["peak_bytes"] < cap_bytes < result["total_bytes"]
