"""What a person sees of a run: a progress bar on a terminal, a line now and then in a log file. Rank 0 only."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.checked_files import printable

LOG_INTERVAL_S = 15.0


class RunProgress:
    """Shows samples seen, in the task's unit, their rate, loss and remaining time; silent on ranks other than 0."""

    def __init__(self, name: str, *, total_samples: int, unit: str, is_shown: bool) -> None:
        self._name, self._total_samples, self._start_samples = printable(name), total_samples, 0
        self._unit = unit
        self._is_shown = is_shown
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        if is_shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{unit}  {{task.fields[numbers]}}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task(self._name, total=total_samples, numbers="")

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def continue_from(self, samples: int) -> None:
        """The run starts here: only what comes after counts for the remaining time."""
        self._start_samples = samples
        self._started = time.monotonic()

    def update(self, samples: int, *, loss: float, samples_per_s: float) -> None:
        """Show the state after an optimizer step."""
        numbers = f"loss {loss:.4f}  {samples_per_s:,.0f} {self._unit}/s"
        if bar := self._living_bar():
            bar.update(self._task, completed=samples, numbers=numbers)
            return
        now = time.monotonic()
        if self._is_shown and (now - self._last_line >= LOG_INTERVAL_S or samples >= self._total_samples):
            self._last_line = now
            done = max(1, samples - self._start_samples)
            remaining_s = (now - self._started) / done * (self._total_samples - samples)
            print(
                f"{self._name}: {samples:,} of {self._total_samples:,} {self._unit}  {numbers}  "
                f"{format_s(remaining_s)} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """One line of text, above the bar where there is one."""
        text = printable(text)
        if bar := self._living_bar():
            bar.console.print(text, markup=False, highlight=False)
        elif self._is_shown:
            print(text, flush=True)

    def _living_bar(self) -> Progress | None:
        """The bar, until its terminal is gone: lines come after it."""
        if self._bar and not sys.stdout.isatty():
            self._bar.stop()
            # It ends without a line's end.
            print(flush=True)
            self._bar = None
        return self._bar


def format_s(seconds: float) -> str:
    """Seconds as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
