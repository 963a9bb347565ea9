"""Runs an experiment on a number of slots: each run is a `train` of its own in an ordinary run folder.

    FOLDER/NAME/             the run
    FOLDER/.sweep/NAME.yaml  the configuration it was started with
    FOLDER/.sweep/NAME.log   what it printed, all attempts

What is finished stands in the run folders alone, so the same command continues after any end. The runs are ended with
this process: by SIGTERM after a signal, by the kernel after a kill.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from data_pipelines.atomic_files import write_whole
from data_pipelines.parent_death import die_with_parent
from sret_scale.config.run_config import from_yaml, split_differences, to_yaml
from sret_scale.lab.experiments.declared import PlannedRun
from sret_scale.lab.experiments.metrics_tail import Standing, standing_of
from sret_scale.lab.experiments.run_slots import Slot
from sret_scale.launch.preflight import is_finished
from sret_scale.runs.run_folder import EXIT_FINISHED, EXIT_STOPPED, RunFolder
from sret_scale.runs.stop_signals import caught_signals

EXIT_REFUSED = 2
POLL_S = 0.2
# A killed sweep's run may still hold its folder for the moment that its ranks need to end.
BUSY_WAIT_S = 60.0


class View(Protocol):
    """Who is told how the sweep stands."""

    def say(self, text: str) -> None:
        """One line."""

    def show(self, states: Sequence["RunState"]) -> None:
        """All runs as they stand; called a few times a second."""


@dataclass(kw_only=True)
class RunState:
    """One run of the sweep. `state` is waiting, running, finished, stopped or failed; `reason` says why it failed."""

    run: PlannedRun
    folder: Path
    state: str = "waiting"
    attempt: int = 0
    slot: str = ""
    reason: str = ""
    standing: Standing = field(default_factory=Standing)


@dataclass(kw_only=True)
class _Job:
    """A run that occupies a slot."""

    state: RunState
    slot: Slot
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]


# The command line of one run: (configuration file, run folder, slot).
Command = Callable[[Path, Path, Slot], Sequence[str]]


def train_command(config: Path, folder: Path, slot: Slot) -> list[str]:
    """`sret-scale train` as a process of this Python."""
    return [sys.executable, "-P", "-m", "sret_scale.cli", "train", str(config), "--run", str(folder), *slot.arguments]


def run_sweep(
    planned: Sequence[PlannedRun],
    folder: Path,
    slots: Sequence[Slot],
    *,
    retries: int,
    view: View,
    command: Command = train_command,
    refusal: Callable[[PlannedRun], str] = lambda run: "",
) -> int:
    """Every run into `folder`/NAME; 0, 85 if a signal stopped it, or 1 if a run failed at the end.

    Finished runs are skipped, a failed one is started again `retries` times and then reported; the others go on, but
    where one was refused with a reason for which `refusal` says that all the others would be: then it returns 2.
    """
    states = [RunState(run=run, folder=folder / run.name) for run in planned]
    for state in states:
        _look(state)
    finished_before = sum(state.state == "finished" for state in states)
    if finished_before:
        view.say(f"{finished_before} of {len(states)} runs finished before")
    with caught_signals() as requests:
        pool = _Pool(folder / ".sweep", slots, retries, view, command, refusal)
        pool.run(states, requests)
    view.show(states)
    if pool.refused_alike:
        view.say(f"stopped: the {pool.refused_alike} runs that are left would be refused alike")
        return EXIT_REFUSED
    for state in states:
        if state.state == "failed":
            view.say(f"failed: {state.run.name}: {state.reason}")
    done = sum(state.state == "finished" for state in states)
    view.say(f"{done} of {len(states)} runs finished in {folder}")
    if any(state.state in ("waiting", "stopped") for state in states):
        view.say("stopped by a signal: the same command continues")
        return EXIT_STOPPED
    return EXIT_FINISHED if done == len(states) else 1


def _look(state: RunState) -> None:
    """Sets a run that needs no start: one that is finished, or whose folder holds another run."""
    folder = RunFolder(state.folder)
    try:
        if not is_finished(folder, state.run.config.train.total_images):
            return
        refused, _ = split_differences(from_yaml(folder.config), state.run.config, is_finished=True)
    except (ValueError, OSError) as error:
        state.state, state.reason = "failed", f"{state.folder} cannot be read ({error}); remove it to run it again"
        return
    if refused:
        what = f"holds a finished run of another configuration: {'; '.join(refused[:3])} (there -> asked for)"
        state.state, state.reason = "failed", f"{state.folder} {what}; choose another --folder, or remove it"
        return
    state.state, state.standing = "finished", standing_of(state.folder)


class _Pool:
    """Slots and what occupies them."""

    def __init__(
        self,
        own: Path,
        slots: Sequence[Slot],
        retries: int,
        view: View,
        command: Command,
        refusal: Callable[[PlannedRun], str],
    ) -> None:
        self.own, self.retries, self.view, self.command, self.refusal = own, retries, view, command, refusal
        self.free = deque(slots)
        self.jobs: list[_Job] = []
        self.refused_alike = 0
        """How many runs were not started, since they would be refused for what refused another one."""
        own.mkdir(parents=True, exist_ok=True)

    def run(self, states: Sequence[RunState], requests: list[int]) -> None:
        """Until every run has ended, or all that ran have saved after a signal."""
        waiting = deque(state for state in states if state.state == "waiting")
        told = 0
        try:
            while self.jobs or (waiting and not requests):
                if len(requests) > told:
                    self._tell(signal.SIGTERM)
                    told = len(requests)
                while waiting and self.free and not requests:
                    self._start(waiting.popleft())
                time.sleep(POLL_S)
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    if self._ended(job, is_stopping=bool(requests)):
                        waiting.appendleft(job.state)
                    elif job.process.returncode == EXIT_REFUSED:
                        self._leave_out_refused(job.state, waiting)
                for job in self.jobs:
                    job.state.standing = standing_of(job.state.folder)
                self.view.show(states)
        finally:
            self._tell(signal.SIGKILL)
            for job in self.jobs:
                job.process.wait()
                job.log.close()

    def _leave_out_refused(self, refused: RunState, waiting: deque[RunState]) -> None:
        """Empties `waiting` if all that wait would be refused for what refused this one."""
        reason = self.refusal(refused.run)
        if reason and waiting and all(self.refusal(state.run) == reason for state in waiting):
            self.refused_alike = len(waiting)
            waiting.clear()

    def _tell(self, number: signal.Signals) -> None:
        for job in self.jobs:
            if job.process.poll() is None:
                job.process.send_signal(number)

    def _start(self, state: RunState) -> None:
        slot = self.free.popleft()
        state.state, state.slot = "running", slot.name
        state.attempt += 1
        config = self.own / f"{state.run.name}.yaml"
        write_whole(config, to_yaml(state.run.config))
        _await_release(state.folder)
        log = (self.own / f"{state.run.name}.log").open("ab")
        # For one more slow import it stands alone: side by side with others, with a log, ended by the kernel with us.
        process = subprocess.Popen(
            self.command(config, state.folder, slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            # Ctrl-C in the terminal reaches this process alone, which asks each run once to save.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.jobs.append(_Job(state=state, slot=slot, process=process, log=log))
        run = state.run
        where = f" on {slot.name}" if len(self.free) + len(self.jobs) > 1 else ""
        self.view.say(
            f"{run.name}: {run.applications} applications, {run.config.train.total_images:,} images, "
            f"attempt {state.attempt} of {1 + self.retries}{where}"
        )

    def _ended(self, job: _Job, *, is_stopping: bool) -> bool:
        """Frees the job's slot; whether the run is to be started again."""
        self.jobs.remove(job)
        self.free.append(job.slot)
        job.log.close()
        state, status = job.state, job.process.returncode
        state.standing = standing_of(state.folder)
        log = Path(job.log.name)
        if status == EXIT_FINISHED:
            state.state = "finished"
            return False
        if status == EXIT_STOPPED or is_stopping:
            state.state = "stopped"
            return False
        # A refused input would be refused again: no retry, and the other runs do not depend on it.
        if status == EXIT_REFUSED or state.attempt > self.retries:
            state.state = "failed"
            why = last_error(log) or f"exit status {status}"
            attempts = "" if status == EXIT_REFUSED else f" after {state.attempt} attempts, see {log}"
            state.reason = why + attempts
            self.view.say(f"{state.run.name}: failed: {state.reason}")
            return False
        self.view.say(f"{state.run.name}: attempt {state.attempt} failed with exit status {status}: starts again")
        state.state = "waiting"
        return True


def _await_release(folder: Path) -> None:
    """Waits until the ranks that a killed sweep left behind have let go of the run; `train` refuses it after that."""
    deadline_s = time.monotonic() + BUSY_WAIT_S
    while folder.is_dir() and time.monotonic() < deadline_s:
        try:
            with RunFolder(folder).locked():
                return
        except ValueError:
            time.sleep(POLL_S)


def last_error(log: Path) -> str:
    """The last line of a log that begins with `error:`, without that word; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.removeprefix("error:").strip() for line in reversed(lines) if line.startswith("error:")), "")
