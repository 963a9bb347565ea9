"""Draws schedules: applications against time, what runs and which boundaries wait in slots meanwhile."""

from collections.abc import Sequence
from pathlib import Path

from sret_scale.memory.planning.ledger import account, draw_rows
from sret_scale.memory.schedule import Kind, Schedule

COLOURS = {Kind.ADVANCE: "#9bb7d4", Kind.OUTPUT: "#9bb7d4", Kind.TAPE: "#e08a3c", Kind.BACK: "#b23a48"}
LABELS = {Kind.ADVANCE: "run, no tape", Kind.TAPE: "run with tape", Kind.BACK: "gradient"}
SLOT_COLOUR = "#5b8c5a"
MAX_DRAWN = 3000
"""Runs of applications in a picture; beyond that lines are thinner than a pixel and drawing takes minutes."""


def draw_schedules(schedules: Sequence[Schedule], path: Path, *, title: str) -> None:
    """Writes a picture (format by suffix: png, svg, pdf), one panel a schedule; ValueError if it could not be read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    runs = max(account(schedule).total_untaped + 2 * schedule.num_applications for schedule in schedules)
    if runs > MAX_DRAWN:
        raise ValueError(
            f"--draw: {runs} runs of applications are too many for a picture, expected at most {MAX_DRAWN}"
        )
    figure, axes = pyplot.subplots(
        len(schedules), 1, figsize=(8, 2.4 * len(schedules)), squeeze=False, layout="constrained"
    )
    for index, (schedule, axis) in enumerate(zip(schedules, axes[:, 0], strict=True)):
        drawn, duration = strokes(schedule)
        axis.add_collection(LineCollection(slot_lines(schedule), colors=SLOT_COLOUR, linewidths=1.2))
        for kind, lines in drawn.items():
            axis.add_collection(LineCollection(lines, colors=COLOURS[kind], linewidths=1.8))
        axis.set(
            xlim=(0, duration),
            ylim=(schedule.num_applications, -0.03 * schedule.num_applications),
            ylabel="application",
        )
        ledger = account(schedule)
        axis.set_title(
            f"stage {index}: {schedule.name}; {ledger.peak_slots} slots, {ledger.peak_taped} taped at once,"
            f" r = {ledger.passes}",
            fontsize=9,
            loc="left",
        )
    axes[-1, 0].set_xlabel("time, in runs of one application (a gradient counts two)")
    handles = [Line2D([], [], color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
    handles.append(Line2D([], [], color=SLOT_COLOUR, label="boundary kept in a slot"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


Line = list[tuple[float, float]]


def strokes(schedule: Schedule) -> tuple[dict[Kind, list[Line]], float]:
    """Lines of all runs by kind, and the time when the last one ends. A gradient runs upwards, the rest downwards."""
    drawn: dict[Kind, list[Line]] = {kind: [] for kind in COLOURS}
    clock = 0.0
    for kind, lo, hi, _ in draw_rows(schedule):
        duration = (2 if kind is Kind.BACK else 1) * (hi - lo)
        ends = (hi, lo) if kind is Kind.BACK else (lo, hi)
        drawn[kind].append([(clock, ends[0]), (clock + duration, ends[1])])
        clock += duration
    return drawn, clock


def slot_lines(schedule: Schedule) -> list[Line]:
    """One horizontal line per kept boundary, from when it is kept until it is taken."""
    lines: list[Line] = []
    since: dict[int, float] = {}
    clock = 0.0
    for kind, lo, hi, kept in draw_rows(schedule):
        for boundary in kept - since.keys():
            since[boundary] = clock
        for boundary in since.keys() - kept:
            lines.append([(since.pop(boundary), boundary), (clock, boundary)])
        clock += (2 if kind is Kind.BACK else 1) * (hi - lo)
    return lines + [[(start, boundary), (clock, boundary)] for boundary, start in since.items()]
