"""The progress of shard work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data_pipelines.stream.processes import Progress

_LINE_EVERY_S = 10.0


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress, on stderr: samples, samples/s, MB/s, remaining time."""
    if sys.stderr.isatty():
        with _bar(what) as show:
            yield show
    else:
        yield _Lines(what)


class _Lines:
    """Plain lines for log files."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        rate = progress.samples / (now - self._start)
        remaining_s = (progress.total_samples - progress.samples) / rate if rate else float("inf")
        print(
            f"{self._what}: {progress.samples:,} of {progress.total_samples:,} samples, {rate:,.0f} samples/s,"
            f" {progress.bytes / (now - self._start) / 1e6:,.1f} MB/s, {remaining_s:,.0f} s remain",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _bar(what: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, rate="")
        start = time.monotonic()

        def show(progress: Progress) -> None:
            seconds = max(time.monotonic() - start, 1e-6)
            rate = f"{progress.samples / seconds:,.0f} samples/s {progress.bytes / seconds / 1e6:,.1f} MB/s"
            bars.update(task, total=progress.total_samples, completed=progress.samples, rate=rate)

        yield show
