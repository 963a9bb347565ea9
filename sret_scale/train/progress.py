"""What a person sees of a run: a progress bar on a terminal, a line now and then in a log file. Rank 0 only."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.checked_files import printable

LOG_INTERVAL_S = 15.0


class RunProgress:
    """Shows images seen, images/s, loss and remaining time; silent on ranks other than 0."""

    def __init__(self, name: str, *, total_images: int, is_shown: bool) -> None:
        self._name, self._total_images, self._start_images = printable(name), total_images, 0
        self._is_shown = is_shown
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        if is_shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("images  {task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task(self._name, total=total_images, numbers="")

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def continue_from(self, images: int) -> None:
        """The run starts here: only what comes after counts for the remaining time."""
        self._start_images = images
        self._started = time.monotonic()

    def update(self, images: int, *, loss: float, images_per_s: float) -> None:
        """Show the state after an optimizer step."""
        numbers = f"loss {loss:.4f}  {images_per_s:,.0f} images/s"
        if bar := self._living_bar():
            bar.update(self._task, completed=images, numbers=numbers)
            return
        now = time.monotonic()
        if self._is_shown and (now - self._last_line >= LOG_INTERVAL_S or images >= self._total_images):
            self._last_line = now
            done = max(1, images - self._start_images)
            remaining_s = (now - self._started) / done * (self._total_images - images)
            print(
                f"{self._name}: {images:,} of {self._total_images:,} images  {numbers}  {format_s(remaining_s)} left",
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
