"""What a person sees of a sweep: a live table on a terminal, a line for what happens and now and then elsewhere."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from data_pipelines.checked_files import printable
from sret_scale.lab.experiments.pool import RunState
from sret_scale.lab.readable_numbers import compact, duration, percent

LINE_INTERVAL_S = 30.0
TABLE_INTERVAL_S = 0.5
MOST_ROWS = 24
"""A table longer than the terminal cannot be redrawn in place; runs that are at work come first."""
_ORDER = ("running", "failed", "stopped", "waiting", "finished")


class SweepView:
    """Inside a `with`: `say` prints a line, `show` redraws the table. It has no thread, since runs are forked."""

    def __init__(self, *, is_live: bool | None = None, console: Console | None = None) -> None:
        self._is_live = sys.stdout.isatty() if is_live is None else is_live
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._is_live else None
        self._last_s = -float("inf")

    def __enter__(self) -> "SweepView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line of text, above the table where there is one."""
        if self._live:
            self._console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), flush=True)

    def show(self, states: Sequence[RunState]) -> None:
        """The table, or a line for each running run once in LINE_INTERVAL_S."""
        now = time.monotonic()
        if self._live:
            is_over = all(state.state != "running" for state in states)
            if is_over or now - self._last_s >= TABLE_INTERVAL_S:
                self._last_s = now
                self._live.update(live_table(states), refresh=True)
            return
        if now - self._last_s < LINE_INTERVAL_S:
            return
        self._last_s = now
        for state in states:
            if state.state == "running" and state.standing.images:
                print(printable("  ".join([f"{state.run.name}:", *cells(state)[2:]])), flush=True)


def cells(state: RunState) -> list[str]:
    """Name, state, samples, samples/s, loss, top-1 and remaining time of a run."""
    standing, total = state.standing, state.run.config.train.total_images
    named = state.state + (f" ({state.slot})" if state.state == "running" and state.slot != "here" else "")
    remaining = standing.remaining_s(total) if state.state == "running" else None
    return [
        printable(state.run.name),
        printable(named),
        f"{standing.images:,} of {total:,}",
        "" if standing.images_per_s is None else f"{compact(standing.images_per_s)} samples/s",
        "" if standing.loss is None else f"loss {standing.loss:.3f}",
        "" if standing.top1 is None else f"{percent(standing.top1)} %",
        "" if remaining is None else f"{duration(remaining)} left",
    ]


def live_table(states: Sequence[RunState]) -> Table:
    """The runs that matter now, and in the title how many are in which state and how long the running ones need."""
    counts = {name: sum(state.state == name for state in states) for name in _ORDER}
    title = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    table = Table(title=title, title_justify="left")
    for name in ("run", "state", "samples", "speed", "loss", "top-1", "remaining"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    shown = sorted(states, key=lambda state: _ORDER.index(state.state))[:MOST_ROWS]
    for state in shown:
        table.add_row(*cells(state))
    if len(states) > len(shown):
        table.add_row(f"... and {len(states) - len(shown)} more", *[""] * 6)
    return table
