"""What a run holds in memory: predicted against measured, and the schedules of recomputation as pictures."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sret_scale.config.run_config import build
from sret_scale.lab.readable_numbers import binary_size, grouped
from sret_scale.lab.report.chart import (
    INK,
    MUTED,
    PAPER,
    STYLE,
    WIDTH_INCHES,
    Caption,
    Chart,
    canvas,
    finish,
    printable,
)
from sret_scale.lab.report.plots import byte_axis
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.lab.report.summary import Summary
from sret_scale.memory import MemoryConfig, Schedule, account, schedule_for
from sret_scale.memory.planning.draw import COLOURS, LABELS, MAX_DRAWN, SLOT_COLOUR, slot_lines, strokes
from sret_scale.memory.schedule import tapered

MOST_SCHEDULES = 4
PANEL_INCHES = 1.5


def memory_figures(runs: Sequence[RunRecord], summaries: Sequence[Summary], colours: Sequence[str]) -> list[Chart]:
    """The figures for which runs have the numbers."""
    charts = [_prediction(summaries, colours), _schedules(runs)]
    return [chart for chart in charts if chart is not None]


def _prediction(summaries: Sequence[Summary], colours: Sequence[str]) -> Chart | None:
    """Measured peak over predicted activations; None unless two runs differ in them."""
    points = [
        (s.predicted_activation_bytes, s.peak_bytes, colour, s)
        for s, colour in zip(summaries, colours, strict=True)
        if s.predicted_activation_bytes is not None and s.peak_bytes is not None
    ]
    if len({predicted for predicted, *_ in points}) < 2:
        return None
    predicted, measured = (np.array([point[place] for point in points], dtype=np.float64) for place in (0, 1))
    rest = float(np.median(measured - predicted))
    off = float(np.abs(measured - predicted - rest).max())
    caption = Caption(
        name="memory_prediction",
        title="Predicted against measured memory",
        text=f"Line: predicted activations and {binary_size(rest)} for all else (code, data, weights, optimiser; the "
        f"median of measured minus predicted). The largest deviation is {binary_size(off)}.",
        x_label="predicted activations",
        y_label="measured peak",
    )
    table: list[tuple[object, ...]] = [("run", "predicted_activation_bytes", "peak_bytes", "peak_minus_line")]
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption)
        figure.subplots_adjust(left=0.17, right=0.95, bottom=0.14, top=0.89)
        ends = np.array([predicted.min(), predicted.max()])
        axes.plot(ends, ends + rest, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        for x, y, colour, summary in points:
            axes.plot(x, y, "o", color=colour, markersize=6)
            table.append((summary.run, x, y, y - x - rest))
        axes.margins(0.12)
        byte_axis(axes.xaxis)
        byte_axis(axes.yaxis)
        return finish(figure, caption, table)


def _schedules(runs: Sequence[RunRecord]) -> Chart | None:
    """The longest chain of each way to recompute; None where nothing recomputes."""
    found: dict[str, tuple[str, Schedule]] = {}
    for run in runs:
        schedule = _longest(run)
        if schedule is not None and _runs(schedule) <= MAX_DRAWN:
            found.setdefault(f"{schedule.name} {schedule.num_applications}", (run.name, schedule))
    shown = list(found.values())[:MOST_SCHEDULES]
    if not shown:
        return None
    caption = Caption(
        name="schedules",
        title="Schedules of recomputation",
        text="Rows: applications of the longest stage. Columns: time, in runs of one application (a gradient counts as "
        "two). Green: a boundary waits in a slot.",
        x_label="time",
    )
    table: list[tuple[object, ...]] = [("run", "schedule", "applications", "slots", "taped_at_once", "passes")]
    height_inches = 0.45 + PANEL_INCHES * len(shown)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), facecolor=PAPER)
        figure.subplots_adjust(
            left=0.1, right=0.98, bottom=0.45 / height_inches, top=1 - 0.25 / height_inches, hspace=0.4
        )
        for place, (name, schedule) in enumerate(shown):
            axes = figure.add_subplot(len(shown), 1, place + 1)
            drawn, duration = strokes(schedule)
            axes.add_collection(LineCollection(slot_lines(schedule), colors=SLOT_COLOUR, linewidths=1.0))
            for kind, lines in drawn.items():
                axes.add_collection(LineCollection(lines, colors=COLOURS[kind], linewidths=1.4))
            axes.set(
                xlim=(0, duration),
                ylim=(schedule.num_applications, 0),
                xticks=[],
                yticks=[0, schedule.num_applications],
            )
            ledger = account(schedule)
            facts = f"{schedule.name}, {ledger.peak_slots} slots, {grouped(ledger.total_untaped)} extra runs"
            title = f"{printable(name, 28)}: {facts}"
            axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=3)
            table.append(
                (name, schedule.name, schedule.num_applications, ledger.peak_slots, ledger.peak_taped, ledger.passes)
            )
        handles = [Line2D([], [], color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
        handles.append(Line2D([], [], color=SLOT_COLOUR, label="kept"))
        figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
        return finish(figure, caption, table)


def _longest(run: RunRecord) -> Schedule | None:
    """The schedule of the run's longest stage; None where it keeps everything, or nothing tells what was planned."""
    section, stages = run.config.get("memory"), run.config.get("model", {}).get("stages", [])
    try:
        memory: MemoryConfig = build(MemoryConfig, section, "memory")
        longest = max(int(stage["num_blocks"]) * int(stage["num_loops"]) for stage in stages)
    except (ValueError, KeyError, TypeError):
        # Another version's config: the page shows what it can.
        return None
    if memory.schedule == "planned":
        return _planned(run, longest)
    return None if memory.schedule == "none" else schedule_for(memory, longest)


def _planned(run: RunRecord, num_applications: int) -> Schedule | None:
    """What the planner chose at the run's last start for a stage of so many applications, by the run's own record."""
    for line in reversed(run.of_kind("plan")):
        for chain in line.get("chains", ()):
            try:
                if chain["num_applications"] == num_applications:
                    return tapered(num_applications, tuple(map(int, chain["leaves"])), int(chain["num_taped"]))
            except (ValueError, KeyError, TypeError):
                # Another version's record, or a run of an older one without: the page shows what it can.
                return None
    return None


def _runs(schedule: Schedule) -> int:
    return account(schedule).total_untaped + 2 * schedule.num_applications
