"""Draws schedules: applications against time, what runs and which boundaries wait in slots meanwhile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sret_scale.memory.planning.ledger import account, draw_rows
from sret_scale.memory.schedule import Kind, Schedule

COLOURS = {Kind.ADVANCE: "#9bb7d4", Kind.OUTPUT: "#9bb7d4", Kind.TAPE: "#e08a3c", Kind.BACK: "#b23a48"}
LABELS = {Kind.ADVANCE: "run, no tape", Kind.TAPE: "run with tape", Kind.BACK: "gradient"}
SLOT_COLOUR = "#5b8c5a"
MAX_DRAWN = 3000
"""Runs of applications in a picture; beyond that lines are thinner than a pixel and drawing takes minutes."""


def draw_schedules(schedules: Sequence[Schedule], path: Path, *, title: str) -> None:
    """Writes a picture (format by suffix: png, svg, pdf), one panel a schedule; ValueError if it could not be read."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = max(account(schedule).total_untaped + 2 * schedule.num_applications for schedule in schedules)
    if runs > MAX_DRAWN:
        raise ValueError(
            f"--draw: {runs} runs of applications are too many for a picture, expected at most {MAX_DRAWN}"
        )
    figure = Figure(figsize=(8, 2.4 * len(schedules)), layout="constrained")
    for index, schedule in enumerate(schedules):
        axis = figure.add_subplot(len(schedules), 1, index + 1)
        _draw(axis, schedule)
        ledger = account(schedule)
        facts = f"{ledger.peak_slots} slots, {ledger.peak_taped} taped at once, r = {ledger.passes}"
        axis.set_title(f"stage {index}: {schedule.name}; {facts}", fontsize=9, loc="left")
    axis.set_xlabel("time, in runs of one application (a gradient counts two)")
    handles = [Line2D([], [], color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
    handles.append(Line2D([], [], color=SLOT_COLOUR, label="boundary kept in a slot"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _draw(axis: Any, schedule: Schedule) -> None:
    """A line for each run, a gradient's upwards, the others' downwards, and one for each boundary while it is kept."""
    from matplotlib.collections import LineCollection

    lines: dict[str, list[list[tuple[float, float]]]] = {colour: [] for colour in (SLOT_COLOUR, *COLOURS.values())}
    since: dict[int, float] = {}
    clock = 0.0
    for kind, lo, hi, kept in draw_rows(schedule):
        since |= dict.fromkeys(kept - since.keys(), clock)
        lines[SLOT_COLOUR] += [[(since.pop(one), one), (clock, one)] for one in since.keys() - kept]
        duration = (2 if kind is Kind.BACK else 1) * (hi - lo)
        ends = (hi, lo) if kind is Kind.BACK else (lo, hi)
        lines[COLOURS[kind]].append([(clock, ends[0]), (clock + duration, ends[1])])
        clock += duration
    for colour, drawn in lines.items():
        axis.add_collection(LineCollection(drawn, colors=colour, linewidths=1.2 if colour == SLOT_COLOUR else 1.8))
    top = -0.03 * schedule.num_applications
    axis.set(xlim=(0, clock), ylim=(schedule.num_applications, top), ylabel="application")
