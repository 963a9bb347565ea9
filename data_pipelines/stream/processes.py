"""Numbered jobs over worker processes that never outlive their command."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipelines.parent_death import die_with_parent

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a command has come, by images and bytes."""

    samples: int
    bytes: int
    total_samples: int


def run_jobs(
    make_worker: Callable[..., Callable[[int], Result]],
    arguments: tuple[Any, ...],
    numbers: Sequence[int],
    num_workers: int,
) -> Iterator[tuple[int, Result]]:
    """(number, result) of each job as it is ready. Each process calls `worker = make_worker(*arguments)` once, then
    `worker(number)` for job after job. One worker runs in this process.

    The first error of a job is raised here, after the jobs that have begun are through; the rest is not begun.
    """
    if num_workers < 1:
        raise ValueError(f"number of workers: expected 1 or more, got {num_workers}")
    if min(num_workers, len(numbers)) <= 1:
        worker = make_worker(*arguments)
        yield from ((number, worker(number)) for number in numbers)
        return
    # Not forked: the caller may have threads (torch), and a fork of those can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(num_workers, len(numbers)),
        mp_context=context,
        initializer=_start,
        initargs=(os.getpid(), make_worker, arguments),
    )
    with pool:
        jobs = {pool.submit(_work, number): number for number in numbers}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool:
            message = "a worker process was killed (out of memory?); run the same command again, or with fewer workers"
            raise OSError(message) from None
        finally:
            pool.shutdown(cancel_futures=True)


# What `make_worker` made in this worker process.
_WORKER: list[Callable[[int], Any]] = []


def _start(parent: int, make_worker: Callable[..., Callable[[int], Any]], arguments: tuple[Any, ...]) -> None:
    # The command hears Ctrl-C and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    _WORKER.append(make_worker(*arguments))


def _work(number: int) -> Any:
    return _WORKER[0](number)
