"""Ends a run that no longer makes progress, and says which rank is the reason.

A collective waits for its slowest rank without a word. So each rank keeps a small file, heartbeats/rank-NNNNN.json,
with its step, what it is doing, and since when; a thread renews it. When a rank has come no further within the time
limit, it compares the files: the rank whose file is no longer renewed (stopped, lost), or else the one that came least
far, is named. How long a rank is lost is a difference between the times of files, so that clocks need not agree.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from data_pipelines.atomic_files import write_whole
from data_pipelines.checked_files import read_checked
from sret_scale.runs.rank_errors import RankError, write_error

EXIT_HANG = 3

Phase = Literal["starting", "evaluating", "saving", "waiting for data", "computing", "in a collective"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a rank comes to them at one step: evaluation and save of a step go before the next batch.

A rank that waits inside the backward pass for the gradients of another is still "computing", so of two ranks at one
step the one that waits for data holds up the one that computes.
"""
REPORT_S = 20.0
"""How long the report of a hang may take; a run folder that does not answer by then is left without one."""
START_SPREAD_S = 60.0
"""Ranks of one start begin within this time of each other, clocks of nodes included; an older file is of another."""


@dataclass(frozen=True)
class _Heartbeat:
    """What a rank says of itself, as JSON in its file."""

    step: int
    phase: Phase
    since_s: float
    host: str


class Watchdog:
    """Inside the `with`, call `progress` after every step and before every long phase."""

    def __init__(self, run_folder: Path, *, rank: int, world_size: int, timeout_s: float) -> None:
        self._run_folder, self._rank, self._world_size, self._timeout_s = run_folder, rank, world_size, timeout_s
        self._folder = run_folder / "heartbeats"
        self._interval_s = min(5.0, timeout_s / 10)
        self.progress(0, "starting")
        self._is_over = threading.Event()
        # Apart, because a file system that stands still (a hard NFS mount) holds whoever writes to it for ever.
        self._beater = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # Begun early: where memory has run out, Python 3.11 waits forever for a new thread to begin.
        self._reporter = threading.Thread(target=self._explain, name="hang report", daemon=True)
        self._is_asked, self._has_reported = threading.Event(), threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._rank == 0:
            # Of an earlier start. A rank that has begun already renews its file long before the time limit.
            for file in self._folder.glob("rank-*.json"):
                file.unlink(missing_ok=True)
        self._beat()
        self._started_s = time.time()
        self._beater.start()
        self._reporter.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        # A file system that stands still must not hold up the end of the run.
        self._thread.join(timeout=10.0)
        self._beater.join(timeout=10.0)

    def progress(self, step: int, phase: Phase) -> None:
        """This rank has come to `step` and now does `phase`, one of PHASES."""
        assert phase in PHASES, phase
        self._step, self._phase, self._since_s, self._moved_s = step, phase, time.time(), time.monotonic()

    def _keep_beating(self) -> None:
        while not self._is_over.wait(self._interval_s):
            try:
                self._beat()
            except OSError as error:
                # A full disk or a stale mount may come back; until then the hang must still be seen.
                print(f"rank {self._rank}: its heartbeat cannot be written: {error}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            if time.monotonic() - self._moved_s > self._timeout_s:
                self._end()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _beat(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Its age is what tells: waiting for a disk that is busy with a checkpoint would make a live rank look lost.
        write_whole(self._file(self._rank), json.dumps(asdict(self._state())), is_durable=False)

    def _state(self) -> "_Heartbeat":
        return _Heartbeat(self._step, self._phase, self._since_s, socket.gethostname())

    def _end(self) -> None:
        """Leave the stacks of all threads and the reason in the run folder, and end this process whatever happens."""
        message = self._message()
        try:
            self._is_asked.set()
            if not self._has_reported.wait(REPORT_S):
                print(f"rank {self._rank}: {message}the run folder does not answer", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        finally:
            os._exit(EXIT_HANG)

    def _message(self) -> str:
        return f"no progress for {self._timeout_s:.0f} s (train.hang_timeout_s): "

    def _explain(self) -> None:
        self._is_asked.wait()
        message = self._message()
        try:
            message += self._culprit()
            self._report(message)
        except Exception:
            traceback.print_exc()
            print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        finally:
            self._has_reported.set()

    def _report(self, message: str) -> None:
        stacks = self._run_folder / "logs" / f"stacks-{self._rank:05d}.txt"
        stacks.parent.mkdir(exist_ok=True)
        with stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        message += f"; stacks of this rank: {stacks}"
        record = RankError(
            time_s=time.time(), rank=self._rank, host=socket.gethostname(), message=message, exit_code=EXIT_HANG
        )
        write_error(self._run_folder, record)

    def _culprit(self) -> str:
        """The rank that the others wait for, and what is known of it."""
        states, times_s = {}, {}
        for rank in range(self._world_size):
            file = self._file(rank)
            if not file.exists() or file.stat().st_mtime < self._started_s - START_SPREAD_S:
                return f"rank {rank} never started"
            times_s[rank] = file.stat().st_mtime
            try:
                states[rank] = read_checked(file, _Heartbeat)
            except ValueError as error:
                return f"rank {rank} left no heartbeat that can be read ({error})"
        # This rank is alive, even where its file can no longer be written.
        states[self._rank] = self._state()
        oldest = min(times_s, key=lambda rank: (rank == self._rank, times_s[rank]))
        age_s = max(times_s.values()) - times_s[oldest]
        if oldest != self._rank and age_s > max(10.0, 3 * self._interval_s):
            where = f"rank {oldest} on {states[oldest].host}"
            return f"{where} has been stopped or lost for {age_s:.0f} s, at step {states[oldest].step}"
        places = {rank: (state.step, PHASES.index(state.phase)) for rank, state in states.items()}
        slowest = min(places, key=lambda rank: places[rank])
        state = states[slowest]
        num_others = sum(place == places[slowest] for place in places.values()) - 1
        also = f" (and so are {num_others} other ranks)" if num_others else ""
        return f"rank {slowest} on {state.host} is at step {state.step}, {state.phase}{also}"
