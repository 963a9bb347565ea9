"""The launcher with toy ranks: status, signals, no orphans, the first error last. Real processes, real DeepSpeed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sret_scale.launch.launcher import exit_status
from sret_scale.launch.rank_bootstrap import run_module

pytestmark = pytest.mark.multi_process

ROOT = Path(__file__).parents[2]
START = """
import sys
from pathlib import Path
from sret_scale.launch.launcher import launch
folder = Path(sys.argv[1])
sys.exit(launch(folder, folder / "config.yaml", num_ranks=2, module="tests.ranks.toy_rank", stop_grace_s=20.0))
"""


def start(folder: Path, action: str) -> "subprocess.Popen[str]":
    folder.mkdir()
    (folder / "config.yaml").write_text(action)
    return subprocess.Popen(
        [sys.executable, "-c", START, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def rank_pids(folder: Path) -> list[int]:
    """Waits until both ranks have said who they are."""
    files = [folder / "pid-0", folder / "pid-1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def left_over(folder: Path) -> list[str]:
    """Command lines of the processes that belong to the run in `folder`; a zombie has none."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


def test_ranks_meet_over_gloo_and_only_rank_0_prints(tmp_path: Path) -> None:
    folder = tmp_path / "run with $(spaces)"
    output, errors = (process := start(folder, "all_reduce")).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [(folder / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]
    # Neither the rendezvous nor gloo is open to other machines.
    assert [(folder / f"listens-{rank}").read_text() for rank in (0, 1)] == ["127.0.0.1", "127.0.0.1"]
    assert output == "hello from rank 0\n"
    assert (folder / "logs" / "rank-00001.log").read_text() == "hello from rank 1\n"


def test_first_error_is_the_last_line_and_later_ones_are_not_shown(tmp_path: Path) -> None:
    _, errors = (process := start(tmp_path / "run", "fail")).communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: RuntimeError: the first error"
    assert "Traceback" in errors and "a later error" not in errors
    assert left_over(tmp_path) == []


def test_mistake_is_one_line_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a rank does after it was started, and what the launcher says of it, in this process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "config.yaml").write_text("mistake")
    assert run_module(tmp_path, "tests.ranks.toy_rank", [str(tmp_path / "config.yaml")]) == 2
    assert "Traceback" in capsys.readouterr().err, "the rank's own log has it"
    assert exit_status(tmp_path, all_ended_well=False, requests=[]) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == "error: expected this, got that"
    assert "Traceback" not in errors


def test_sigterm_lets_the_ranks_save_and_returns_their_status(tmp_path: Path) -> None:
    process = start(folder := tmp_path / "run", "sleep")
    rank_pids(folder)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"stopped"' in (folder / "status.json").read_text()
    assert left_over(folder) == []


def test_signal_to_every_process_of_a_node_still_lets_the_ranks_save(tmp_path: Path) -> None:
    process = start(folder := tmp_path / "run", "sleep")
    ranks = [psutil.Process(pid) for pid in rank_pids(folder)]
    deepspeed = ranks[0].parent()
    assert deepspeed is not None
    agent = deepspeed.parent()
    assert agent is not None
    # Slurm does this when it preempts a job.
    for target in (agent, deepspeed, *ranks):
        target.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"stopped"' in (folder / "status.json").read_text()
    assert left_over(folder) == []


@pytest.mark.parametrize("victim", ["launcher", "agent", "deepspeed"])
def test_kill_9_leaves_no_orphan(tmp_path: Path, victim: str) -> None:
    process = start(folder := tmp_path / "run", "sleep")
    ranks = rank_pids(folder)
    deepspeed = psutil.Process(ranks[0]).parent()
    assert deepspeed is not None
    agent = deepspeed.parent()
    assert agent is not None
    agent_pid = agent.pid
    {"launcher": psutil.Process(process.pid), "agent": agent, "deepspeed": deepspeed}[victim].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: left_over(folder) == [] and not psutil.pid_exists(agent_pid), timeout_s=10)


def test_killed_rank_is_named_and_its_peer_ends(tmp_path: Path) -> None:
    process = start(folder := tmp_path / "run", "sleep")
    os.kill(rank_pids(folder)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    # When DeepSpeed's launcher looks first, both ranks come into question.
    assert re.match("error: rank (0 or )?1 was ended by SIGKILL", errors.splitlines()[-1])
    assert left_over(folder) == []


@pytest.mark.parametrize("status", ["", '{"state": "running"}', '{"state": "finished"}', "[]"])
def test_end_without_a_whole_status_file_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    if status:
        (tmp_path / "status.json").write_text(status)
    assert exit_status(tmp_path, all_ended_well=True, requests=[]) == 1
    assert "ended well, and " in capsys.readouterr().err.splitlines()[-1]
