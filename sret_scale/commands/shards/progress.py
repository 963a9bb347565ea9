"""The progress of shard work on stderr: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data_pipelines.stream.processes import Progress


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress: samples, samples/s, MB/s, remaining time."""
    from sret_scale.train.progress import RunProgress

    start = time.monotonic()
    with RunProgress(what, total_samples=0, unit="samples", is_shown=True, stream="stderr") as shown:

        def show(progress: Progress) -> None:
            seconds = max(time.monotonic() - start, 1e-6)
            rates = f"{progress.samples / seconds:,.0f} samples/s  {progress.bytes / seconds / 1e6:,.1f} MB/s"
            shown.update(progress.samples, rates, total_samples=progress.total_samples)

        yield show
