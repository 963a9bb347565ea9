"""What a person sees of long work: a progress bar on a terminal, a line now and then in a log file."""

import sys
import time
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.checked_files import printable

LOG_INTERVAL_S = 15.0


class RunProgress:
    """Shows samples done, numbers and remaining time; silent where it is not to be shown, as on ranks other than 0.

    What goes to stderr accompanies the work of a command: no line of it comes at once, and its bar goes at the end.
    """

    def __init__(
        self,
        name: str,
        *,
        total_samples: int,
        unit: str,
        is_shown: bool,
        stream: Literal["stdout", "stderr"] = "stdout",
    ) -> None:
        self._name, self._total_samples, self._start_samples = printable(name), total_samples, 0
        self._unit, self._is_shown, self._stream = unit, is_shown, stream
        self._started = time.monotonic()
        self._is_patient = stream == "stderr"
        self._last_line = self._started if self._is_patient else -float("inf")
        self._bar: Progress | None = None
        if is_shown and getattr(sys, stream).isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{unit}  {{task.fields[numbers]}}"),
                TimeRemainingColumn(),
                console=Console(stderr=stream == "stderr"),
                transient=self._is_patient,
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

    def update(self, samples: int, numbers: str, *, total_samples: int | None = None) -> None:
        """Show the state: samples done so far, numbers beside them, and another total where it is known only now."""
        self._total_samples = total_samples or self._total_samples
        if bar := self._living_bar():
            bar.update(self._task, total=self._total_samples, completed=samples, numbers=numbers)
            return
        now = time.monotonic()
        is_end = samples >= self._total_samples and not self._is_patient
        if self._is_shown and (now - self._last_line >= LOG_INTERVAL_S or is_end):
            self._last_line = now
            done = max(1, samples - self._start_samples)
            remaining_s = (now - self._started) / done * (self._total_samples - samples)
            print(
                f"{self._name}: {samples:,} of {self._total_samples:,} {self._unit}  {numbers}  "
                f"{format_s(remaining_s)} left",
                file=getattr(sys, self._stream),
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
        if self._bar and not getattr(sys, self._stream).isatty():
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
