"""A terminal that goes: hang-ups save the run or are ignored under nohup, and lost output ends no run."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sret_scale.runs.stop_signals import STOP_SIGNALS, caught_signals
from sret_scale.train.stop import StopFlag
from tests.data.shard_sources import make_tree
from tests.launch.test_launch_run import ROOT, START, left_over, rank_pids, start
from tests.runs import wait_for_images
from tests.tiny import environment, tiny_config, tiny_shards, write_config


@pytest.fixture(autouse=True)
def at_a_terminal() -> Iterator[None]:
    """Hang-ups are as at a terminal, though the tests themselves be started by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


@pytest.fixture
def own_signals() -> Iterator[None]:
    """What a rank leaves ignored is put back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_a_hangup_sets_the_stop_flag_of_a_rank() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.is_set


@pytest.mark.usefixtures("own_signals")
def test_a_signal_that_reaches_a_rank_after_its_orderly_end_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError), StopFlag():
        raise ValueError("of the run")
    assert signal.getsignal(signal.SIGTERM) == before
    with StopFlag() as stop:
        pass  # Another rank's signal ends the loop.
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
    assert not stop.is_set


@pytest.mark.usefixtures("own_signals", "under_nohup")
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


def command(words: str) -> "subprocess.CompletedProcess[str]":
    """The command line with the shell's redirections behind it."""
    line = f"exec {sys.executable} -P -m sret_scale.cli {words}"
    return subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.multi_process
def test_a_table_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    full = command("describe sret_t >/dev/full")
    assert full.returncode == 2 and full.stderr.splitlines()[-1].endswith("No space left on device")
    closed = command("describe sret_t --json >&-")
    assert (closed.returncode, closed.stderr) == (2, "error: the output cannot be written: Bad file descriptor\n")
    left = command("describe sret_t | true; exit ${PIPESTATUS[0]}".replace("exec ", ""))
    assert left.returncode in (0, 1) and left.stderr == ""


@pytest.mark.multi_process
def test_a_bad_input_has_its_status_where_its_message_is_lost() -> None:
    assert command("describe no_such_model 2>/dev/full").returncode == 2
    assert command("describe no_such_model 2>&-").returncode == 2


@pytest.mark.parametrize("gone", [">/dev/full", ">&-", "<&- >&- 2>&-"])
@pytest.mark.multi_process
def test_shards_are_written_whoever_reads_of_it(tmp_path: Path, gone: str) -> None:
    source = make_tree(tmp_path / "images")
    assert command(f"shards write folder {source} {tmp_path / 'shards'} --workers 1 {gone}").returncode == 0
    assert (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.multi_process
@pytest.mark.parametrize("gone", [">/dev/full", "| true", "<&- >&- 2>&-"])
def test_a_run_whose_output_nobody_takes_goes_on_into_its_log(tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("finish")
    call = "import sys; from sret_scale.launch.output import open_missing_streams; open_missing_streams()"
    program = tmp_path / "start.py"
    program.write_text(call + START)
    line = f"{sys.executable} {program} {folder} {gone}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment(), cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
    assert '"finished"' in (folder / "status.json").read_text()
    logs = [(folder / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert ["hello from rank 0\n" in logs[0], "hello from rank 1\n" in logs[1]] == [True, True]


@pytest.mark.multi_process
def test_a_progress_bar_whose_terminal_goes_becomes_lines_of_the_log(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from sret_scale.launch.rank_bootstrap import redirect_output
from sret_scale.train.progress import RunProgress
redirect_output(Path(sys.argv[1]), 0)
with RunProgress("run", total_samples=100, unit="images", is_shown=True) as progress:
    progress.update(10, "loss 2.0000  1 images/s")
    progress.say("on the terminal")
    os.write(int(sys.argv[2]), b"!")
    os.read(int(sys.argv[3]), 1)
    progress.update(20, "loss 1.0000  1 images/s")
    progress.say("a line")
"""
    ours, theirs = pty.openpty()
    (said, says), (heard, hears) = os.pipe(), os.pipe()
    arguments = [str(tmp_path), str(says), str(heard)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=theirs, env={**environment(), "TERM": "xterm"}, pass_fds=(says, heard),
    )  # fmt: skip
    os.close(theirs)
    assert os.read(said, 1) == b"!"
    os.close(ours)
    os.write(hears, b"!")
    assert process.wait(timeout=60) == 0
    for descriptor in (said, says, heard, hears):
        os.close(descriptor)
    lines = (tmp_path / "logs" / "rank-00000.log").read_text().splitlines()
    assert lines[-2].startswith("run: 20 of 100 images  loss 1.0000") and lines[-1] == "a line"


@pytest.mark.multi_process
def test_a_run_whose_terminal_is_closed_saves_itself(tmp_path: Path) -> None:
    """A hang-up, and output that ends in errors from then on."""
    config = tiny_config(tiny_shards(tmp_path / "shards"))
    file = write_config(tmp_path / "tiny.yaml", config, total_images=32_000, checkpoint_interval_images=0)
    ours, theirs = pty.openpty()
    words = ["train", str(file), "--run", str(tmp_path / "run")]
    process = subprocess.Popen(
        # setsid makes the first terminal that is opened the controlling one, as a login does.
        ["setsid", "--wait", "--ctty", sys.executable, "-P", "-m", "sret_scale.cli", *words],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), text=True,
    )  # fmt: skip
    os.close(theirs)
    wait_for_images(tmp_path / "run", 32, process)
    os.close(ours)
    assert process.wait(timeout=120) == 85
    assert '"stopped"' in (tmp_path / "run" / "status.json").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "stopped by a signal" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
