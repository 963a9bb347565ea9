"""A teacher larger than what one rank may hold, cut over two gloo ranks, answers like a whole one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Two ranks hold half of the weights each; one layer of ten is gathered at a time.
CAP_RATIO = 0.7


@pytest.mark.multi_process
def test_sharded_teacher_fits_under_a_cap_and_answers_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.teacher_ranks", str(tmp_path / "rank")],
            env={**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    for rank in range(2):
        for result in json.loads((tmp_path / f"rank.{rank}").read_text()).values():
            cap_bytes = CAP_RATIO * result["total_bytes"]
            assert result["is_equal"] and result["gradient"] > 0
            assert result["peak_bytes"] < cap_bytes < result["total_bytes"]
