"""A trace of a few steps by torch's profiler, for chrome://tracing or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import profile, schedule

SKIPPED_STEPS = 3
"""Steps before the trace: the first ones allocate and compile. The one before it warms the profiler up."""


@contextlib.contextmanager
def step_profiler(file: Path, num_steps: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """What to call behind every step; the trace of `num_steps` of them is written to `file` when they are done, or at
    the end if that comes first. With 0 steps nothing happens."""
    if not num_steps:
        yield lambda: None
        return

    def write(found: profile) -> None:
        found.export_chrome_trace(str(file))
        say(f"profile of {num_steps} steps: {file} (open it in Perfetto or chrome://tracing)")

    steps = schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
