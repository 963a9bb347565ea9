"""Processes that write the shards of a plan, each taking the next one that nobody has.

    worker: for each shard -> done? next -> claimed by another worker or node? next -> write it

A claim is a lock on a file in the shared folder, which the kernel frees when its process dies. Should a file system
lose a lock and two workers write one shard, both rename the same bytes to the same name.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_EXCEPTION, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.index import WORK_FOLDER
from data_pipelines.processes import CONTEXT, worker_pool
from data_pipelines.sources.kinds import source_kind
from data_pipelines.writing.plan import Plan, load_plan
from data_pipelines.writing.shard_writer import ShardOptions, is_done, write_shard

_REPORT_EVERY_S = 0.25

# Per worker in the shared counters: images, bytes, stop.
_FIELDS = 3


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far this command has come; what other nodes write is not counted."""

    samples: int
    bytes: int
    total_samples: int


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """True while this process holds the lock file `path`, False when another one holds it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write_missing(
    plan: Plan, target: Path, *, options: ShardOptions, num_workers: int, on_progress: Callable[[Progress], None]
) -> None:
    """Writes all shards that are not done. Returns when every shard is done, by whomever."""
    missing = _missing(plan, target)
    total = sum(int(plan.starts[index + 1] - plan.starts[index]) for index in missing)
    report = _Reporter(total, on_progress)
    while missing:
        if num_workers == 1:
            _write_claimed(plan, target, options, missing, _Counter([0] * _FIELDS, 0, report))
        else:
            _run_pool(target, options, missing, min(num_workers, len(missing)), report)
        missing = _missing(plan, target)
        if missing:
            # Other nodes are at work on the rest; should one die, its shards become free.
            time.sleep(_REPORT_EVERY_S)


def _missing(plan: Plan, target: Path) -> list[int]:
    return [index for index in range(plan.num_shards) if not is_done(target, index)]


class _Reporter:
    """Passes the sum of the workers' counters on, a few times a second."""

    def __init__(self, total_samples: int, on_progress: Callable[[Progress], None]) -> None:
        self._total = total_samples
        self._on_progress = on_progress
        self._last = 0.0

    def __call__(self, counters: MutableSequence[int], *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._last >= _REPORT_EVERY_S:
            self._last = now
            values = list(counters)
            self._on_progress(
                Progress(samples=sum(values[0::_FIELDS]), bytes=sum(values[1::_FIELDS]), total_samples=self._total)
            )


class _Counter:
    """A worker's own place in the shared counters: it alone writes there, so no lock is needed."""

    def __init__(
        self, counters: MutableSequence[int], worker: int, after: Callable[[MutableSequence[int]], None]
    ) -> None:
        self._counters = counters
        self._place = worker * _FIELDS
        self._after = after

    def __call__(self, num_bytes: int) -> None:
        self._counters[self._place] += 1
        self._counters[self._place + 1] += num_bytes
        self._after(self._counters)


def _write_claimed(
    plan: Plan, target: Path, options: ShardOptions, shards: list[int], on_sample: Callable[[int], None]
) -> None:
    """Writes those of `shards` that are neither done nor claimed."""
    reader = source_kind(plan.arguments["kind"]).open_reader()
    try:
        for index in shards:
            with claim(target / WORK_FOLDER / f"claim-{index:06d}") as is_mine:
                if is_mine and not is_done(target, index):
                    write_shard(plan, index, target, options=options, reader=reader, on_sample=on_sample)
    finally:
        reader.close()


def _run_pool(target: Path, options: ShardOptions, shards: list[int], num_workers: int, report: _Reporter) -> None:
    """Writes `shards` with `num_workers` processes. Raises the first error of any of them, when all have stopped."""
    counters = CONTEXT.RawArray("q", _FIELDS * num_workers)
    with worker_pool(num_workers, _keep, counters) as pool:
        # Each starts at another shard, so that they seldom ask for the same claim.
        starts = [worker * len(shards) // num_workers for worker in range(num_workers)]
        jobs = [
            pool.submit(_work, worker, target, options, shards[start:] + shards[:start])
            for worker, start in enumerate(starts)
        ]
        try:
            while True:
                done, pending = wait(jobs, timeout=_REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
                report(counters, at_once=True)
                for job in done:
                    job.result()
                if not pending:
                    return
        except BrokenProcessPool:
            message = "a worker process was killed (out of memory?); run the same command again to continue"
            raise OSError(message) from None
        finally:
            for worker in range(num_workers):
                counters[worker * _FIELDS + 2] = 1


# The shared counters that a worker process was given when it started.
_KEPT: list[MutableSequence[int]] = []


def _keep(counters: MutableSequence[int]) -> None:
    _KEPT.append(counters)


def _work(worker: int, target: Path, options: ShardOptions, shards: list[int]) -> None:
    """One worker process: reads the plan from the folder and writes what is free."""

    def stop_if_told(counters: MutableSequence[int]) -> None:
        if counters[worker * _FIELDS + 2]:
            raise InterruptedError("another worker failed")

    plan = load_plan(target / WORK_FOLDER)
    _write_claimed(plan, target, options, shards, _Counter(_KEPT[0], worker, stop_if_told))
