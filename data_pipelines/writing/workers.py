"""Processes that write the shards of a plan, each taking the next one that nobody has.

    worker: shard done? next -> claimed by another worker or node? next -> write it

A claim is a lock on a file in the shared folder, which the kernel frees when its process dies. Should a file system
lose a lock and two workers write one shard, both rename the same bytes to the same name.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.atomic_files import lock_file
from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.sources.kinds import source_kind
from data_pipelines.stream.processes import Progress, run_jobs
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.rows import DoneShard
from data_pipelines.writing.shard_plan import Plan, load_plan
from data_pipelines.writing.shard_writer import is_done, write_shard

_ASK_AGAIN_S = 0.25


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """True while this process holds the lock file `path`, False when another one holds it."""
    with path.open("ab") as file:
        try:
            lock_file(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), path)
        except BlockingIOError:
            yield False
            return
        yield True


def write_missing(
    plan: Plan,
    target: Path,
    *,
    options: ImageOptions,
    num_workers: int,
    max_bad_rate: float,
    on_progress: Callable[[Progress], None],
) -> None:
    """Writes all shards that are not done. Returns when every shard is done, by whomever."""
    missing = _missing(plan, target)
    total = sum(int(plan.starts[index + 1] - plan.starts[index]) for index in missing)
    num_samples = num_bytes = num_rejected = 0
    while missing:
        for _, done in run_jobs(_Worker, (target, options), missing, num_workers):
            if done is None:
                continue
            num_samples += done.num_samples + len(done.rejected)
            num_bytes += done.bytes
            num_rejected += len(done.rejected)
            check_bad_rate(num_rejected, len(plan.listing), max_bad_rate, target)
            on_progress(Progress(samples=num_samples, bytes=num_bytes, total_samples=total))
        missing = _missing(plan, target)
        if missing:
            # Other nodes are at work on the rest; should one die, its shards become free.
            time.sleep(_ASK_AGAIN_S)


def check_bad_rate(num_rejected: int, num_images: int, max_bad_rate: float, target: Path) -> None:
    """Raises ValueError when more samples are bad than the share that was allowed."""
    if num_rejected > max_bad_rate * num_images:
        raise ValueError(
            f"{target}: {num_rejected:,} of {num_images:,} samples are bad, more than the share of {max_bad_rate:g} "
            "that is allowed; look at the source, or allow more with --max-bad-rate"
        )


def _missing(plan: Plan, target: Path) -> list[int]:
    return [index for index in range(plan.num_shards) if not is_done(target, index)]


class _Worker:
    """Writes a shard if it is neither done nor claimed."""

    def __init__(self, target: Path, options: ImageOptions) -> None:
        self._target = target
        self._options = options
        self._plan = load_plan(target / WORK_FOLDER)
        self._reader = source_kind(self._plan.arguments["kind"]).open_reader()

    def __call__(self, index: int) -> DoneShard | None:
        with claim(self._target / WORK_FOLDER / f"claim-{index:06d}") as is_mine:
            if not is_mine or is_done(self._target, index):
                return None
            return write_shard(self._plan, index, self._target, options=self._options, reader=self._reader)
