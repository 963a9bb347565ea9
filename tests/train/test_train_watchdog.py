"""The watchdog: which rank it names, and that nothing keeps it from ending a process that hangs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sret_scale.runs.rank_errors import first_error
from sret_scale.train.watchdog import EXIT_HANG, PHASES, Watchdog
from tests.tiny import ROOT


def beat(run: Path, rank: int, step: int, phase: str, *, age_s: float = 0.0) -> Path:
    """What a rank left `age_s` ago."""
    file = run / "heartbeats" / f"rank-{rank:05d}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"step": step, "phase": phase, "since_s": 0.0, "host": f"node{rank}"}))
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def culprit(run: Path, *others: tuple[int, str]) -> str:
    """Of rank 0 at step 5, computing, and the ranks after it."""
    with Watchdog(run, rank=0, world_size=1 + len(others), timeout_s=100.0) as dog:
        dog.progress(5, "computing")
        dog._beat()
        for rank, (step, phase) in enumerate(others, start=1):
            beat(run, rank, step, phase)
        return dog._culprit()


@pytest.mark.parametrize("phase", PHASES[:4])
def test_a_rank_that_has_not_come_to_computing_holds_up_one_that_waits_in_backward(tmp_path: Path, phase: str) -> None:
    assert culprit(tmp_path, (5, "computing"), (5, phase)) == f"rank 2 on node2 is at step 5, {phase}"


def test_the_rank_that_computes_holds_up_those_in_a_collective(tmp_path: Path) -> None:
    said = culprit(tmp_path, (5, "in a collective"), (5, "in a collective"))
    assert said.startswith("rank 0 on ") and said.endswith("is at step 5, computing")


def test_an_earlier_step_counts_before_any_phase(tmp_path: Path) -> None:
    assert culprit(tmp_path, (4, "in a collective"), (5, "starting")).startswith("rank 1 on node1 is at step 4")


def test_ranks_at_the_same_place_are_counted(tmp_path: Path) -> None:
    assert culprit(tmp_path, (5, "computing"), (6, "saving")).endswith("computing (and so are 1 other ranks)")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"step": 5',
        "[]",
        '{"step": "5", "phase": "computing", "since_s": 0, "host": ""}',
        '{"step": 5, "phase": "thinking", "since_s": 0, "host": ""}',
    ],
)
def test_a_heartbeat_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    with Watchdog(tmp_path, rank=0, world_size=2, timeout_s=100.0) as dog:
        dog._beat()
        beat(tmp_path, 1, 5, "computing").write_text(content)
        said = dog._culprit()
    assert said.startswith("rank 1 left no heartbeat that can be read") and "rank-00001.json" in said


def test_a_heartbeat_of_an_earlier_start_is_a_rank_that_never_started(tmp_path: Path) -> None:
    beat(tmp_path, 1, 70, "computing", age_s=5.0)
    with Watchdog(tmp_path, rank=0, world_size=2, timeout_s=100.0) as dog:
        assert dog._culprit() == "rank 1 never started"
    beat(tmp_path, 0, 70, "computing", age_s=3600.0)
    with Watchdog(tmp_path, rank=1, world_size=2, timeout_s=100.0) as dog:
        assert dog._culprit() == "rank 0 never started"


def test_two_ranks_of_one_start_see_each_other_and_the_one_that_stops(tmp_path: Path) -> None:
    second = Watchdog(tmp_path, rank=1, world_size=2, timeout_s=5.0)
    with second, Watchdog(tmp_path, rank=0, world_size=2, timeout_s=5.0) as first:
        second.progress(3, "waiting for data")
        second._beat()
        first.progress(3, "computing")
        first._beat()
        assert "rank 1 on " in first._culprit() and "step 3, waiting for data" in second._culprit()
        second.__exit__(None, None, None)
        beat(tmp_path, 1, 3, "in a collective", age_s=30.0)
        assert "rank 1 on node1 has been stopped or lost for 30 s, at step 3" in first._culprit()


HANG = """
import sys, time
from pathlib import Path
from sret_scale.train import watchdog

def refuse(*_arguments, **_options):
    raise OSError(28, "No space left on device")

def stand_still(*_arguments, **_options):
    time.sleep(120)

watchdog.REPORT_S = 1.0
kind, *names = sys.argv[2:]
with watchdog.Watchdog(Path(sys.argv[1]), rank=0, world_size=1, timeout_s=0.5) as dog:
    dog.progress(2, "computing")
    for name in names:
        setattr(watchdog, name, {"refuse": refuse, "stand_still": stand_still}[kind])
    time.sleep(60)
"""


TWO_RANKS = """
import sys, time
from pathlib import Path
from sret_scale.train.watchdog import Watchdog

def waiting_for_data(): time.sleep(60)
def waiting_for_the_other(): time.sleep(60)

rank = int(sys.argv[2])
with Watchdog(Path(sys.argv[1]), rank=rank, world_size=2, timeout_s=4.0) as dog:
    dog.progress(2, "in a collective" if rank == 0 else "waiting for data")
    (waiting_for_the_other if rank == 0 else waiting_for_data)()
"""


@pytest.mark.multi_process
def test_every_rank_leaves_its_stacks_and_names_the_one_that_is_waited_for(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", TWO_RANKS, str(tmp_path), str(rank)] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for command in commands]
    assert [rank.wait(timeout=60) for rank in ranks] == [EXIT_HANG, EXIT_HANG]
    for rank, function in enumerate(("waiting_for_the_other", "waiting_for_data")):
        assert f"in {function}" in (tmp_path / "logs" / f"stacks-{rank:05d}.txt").read_text()
    record = first_error(tmp_path)
    assert record is not None and "rank 1 on " in record.message and "step 2, waiting for data" in record.message


@pytest.mark.parametrize("broken", [(), ("write_whole",), ("write_whole", "write_error")])
@pytest.mark.multi_process
def test_a_hang_ends_the_process_even_on_a_full_disk(tmp_path: Path, broken: tuple[str, ...]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path), "refuse", *broken],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == EXIT_HANG, run.stderr
    assert ("heartbeat cannot be written: [Errno 28]" in run.stderr) == bool(broken)
    record = first_error(tmp_path)
    if "write_error" in broken:
        assert record is None and 'File "<string>", line 18 in <module>' in run.stderr
        assert "rank 0: no progress for 0 s" in run.stderr and "is at step 2, computing" in run.stderr
    else:
        assert record is not None and "no progress for 0 s" in record.message and record.exit_code == EXIT_HANG


@pytest.mark.multi_process
def test_a_file_system_that_stands_still_does_not_stop_the_watchdog(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path), "stand_still", "write_whole", "write_error"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == EXIT_HANG, run.stderr
    assert "no progress for 0 s (train.hang_timeout_s): the run folder does not answer" in run.stderr
    assert 'File "<string>", line 18 in <module>' in run.stderr


def test_a_clock_that_jumps_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda _dog: ended.append("end"))
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_s=1.0):
        now_s = time.time()
        monkeypatch.setattr(time, "time", lambda: now_s + 3600)
        time.sleep(0.3)
    assert ended == []
