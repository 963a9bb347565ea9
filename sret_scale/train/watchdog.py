"""Ends a run that no longer makes progress, and says which rank is the reason.

A collective waits for its slowest rank without a word. So each rank keeps a small file, heartbeats/rank-NNNNN.json,
with its step, what it is doing, and since when; a thread renews it. When a rank has come no further within the time
limit, it compares the files: the rank whose file is no longer renewed (stopped, lost), or else the one that came least
far, is named.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from sret_scale.train.node.errors import RankError, write_error
from sret_scale.train.run_folder import write_json

EXIT_HANG = 3


class Watchdog:
    """Inside the `with`, call `progress` after every step and before every long phase."""

    def __init__(self, run_folder: Path, *, rank: int, world_size: int, timeout_s: float) -> None:
        self._run_folder, self._rank, self._world_size, self._timeout_s = run_folder, rank, world_size, timeout_s
        self._interval_s = min(5.0, timeout_s / 10)
        self._step, self._phase, self._since_s = 0, "starting", time.time()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def progress(self, step: int, phase: str) -> None:
        """This rank has come to `step` and now does `phase`, such as "waiting for data"."""
        self._step, self._phase, self._since_s = step, phase, time.time()

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            self._beat()
            if time.time() - self._since_s > self._timeout_s:
                self._end()

    def _beat(self) -> None:
        folder = self._run_folder / "heartbeats"
        folder.mkdir(parents=True, exist_ok=True)
        now = {"step": self._step, "phase": self._phase, "since_s": self._since_s, "host": socket.gethostname()}
        write_json(folder / f"rank-{self._rank:05d}.json", now)

    def _end(self) -> None:
        """Leave the stacks of all threads and the reason in the run folder, and end this process."""
        stacks = self._run_folder / "logs" / f"stacks-{self._rank:05d}.txt"
        stacks.parent.mkdir(exist_ok=True)
        with stacks.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        message = (
            f"no progress for {self._timeout_s:.0f} s (train.hang_timeout_s): {self._culprit()}; "
            f"stacks of this rank: {stacks}"
        )
        record = RankError(
            time_s=time.time(), rank=self._rank, host=socket.gethostname(), message=message, exit_code=EXIT_HANG
        )
        write_error(self._run_folder, record)
        os._exit(EXIT_HANG)

    def _culprit(self) -> str:
        states = {}
        for rank in range(self._world_size):
            file = self._run_folder / "heartbeats" / f"rank-{rank:05d}.json"
            if not file.exists():
                return f"rank {rank} never started"
            age_s = time.time() - file.stat().st_mtime
            state = json.loads(file.read_text(encoding="utf-8"))
            if age_s > max(10.0, 3 * self._interval_s):
                where = f"rank {rank} on {state['host']}"
                return f"{where} has been stopped or lost for {age_s:.0f} s, at step {state['step']}"
            states[rank] = state
        slowest = min(states, key=lambda rank: (states[rank]["step"], states[rank]["phase"] == "in a collective"))
        state = states[slowest]
        return f"rank {slowest} on {state['host']} is at step {state['step']}, {state['phase']}"
