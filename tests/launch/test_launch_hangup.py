"""A terminal that goes: hang-ups save the run or are ignored under nohup, and lost output ends no run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sret_scale.launch.child_processes import caught_signals
from sret_scale.train.stop import StopFlag
from tests.launch.test_launch_run import left_over, rank_pids, start


@pytest.fixture
def under_nohup() -> Iterator[None]:
    """What a process is like that `nohup` started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_hangup_asks_to_save_and_is_never_the_second_urgent_request() -> None:
    with caught_signals() as requests:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert requests == [signal.SIGHUP], "the kernel and the shell both tell of one terminal"
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert requests == [signal.SIGHUP, signal.SIGTERM]


def test_a_hangup_sets_the_stop_flag_of_a_rank() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.is_set
    finally:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("under_nohup")
def test_under_nohup_hangups_stay_ignored() -> None:
    with StopFlag() as stop, caught_signals() as requests:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set and requests == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.multi_process
def test_a_hangup_lets_the_ranks_save(tmp_path: Path) -> None:
    process = start(folder := tmp_path / "run", "sleep")
    rank_pids(folder)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"stopped"' in (folder / "status.json").read_text()
    assert left_over(folder) == []


@pytest.mark.multi_process
@pytest.mark.usefixtures("under_nohup")
def test_under_nohup_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    process = start(folder := tmp_path / "run", "all_reduce")
    pids = rank_pids(folder)
    for target in (process.pid, *pids):
        os.kill(target, signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert '"finished"' in (folder / "status.json").read_text()
