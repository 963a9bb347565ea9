"""Depth health: heat maps of a run's telemetry, loop by loop (down) over samples seen (across), and its alarms.

Reads the records that docs/depth.md describes; null is a gap. The stages lie below one another in the order in which
they run, and inside a stage its blocks.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from sret_scale.lab.readable_numbers import compact, evenly
from sret_scale.lab.report.chart import MUTED, PAPER, STYLE, WIDTH_INCHES, Caption, Chart, finish, printable
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.runs.metrics_log import Floats, number

MOST_RUNS = 6
MOST_TITLE = 44
MOST_PROBES = 60
"""Probes drawn and written, spread evenly; more are thinner than a pixel."""
PANEL_INCHES = 1.75

# List of a record -> title of its panel, whether its colours are logarithmic.
PANELS: dict[str, tuple[str, bool]] = {
    "rms": ("stream RMS", True),
    "branch_ratio": ("branch / skip", True),
    "step_ratio": ("relative step", True),
    "gradient_norm": ("gradient of each use", True),
    "gradient_cosine": ("cosine to the next use", False),
    "token_cosine": ("token cosine (1: collapse)", False),
    "rank_ratio": ("effective rank / width", False),
    "attention_entropy": ("attention entropy", False),
}


def health_figures(runs: Sequence[RunRecord]) -> list[Chart]:
    """One figure for each run with two probes or more: MOST_RUNS of them, each depth's first before others."""
    measured = [run for run in runs if len(_probes(run)) > 1]
    depths = [run.model["applications"] for run in measured]
    order = sorted(range(len(measured)), key=lambda place: depths[:place].count(depths[place]))[:MOST_RUNS]
    measured = [measured[place] for place in sorted(order)]
    return [_figure(run, index) for index, run in enumerate(measured)]


def alarms(run: RunRecord) -> list[str]:
    """The run's alarms as remarks, each once, with where it came first."""
    first: dict[str, float] = {}
    for line in run.of_kind("telemetry"):
        for text in line.get("alarms") or ():
            first.setdefault(str(text), float(line["images"]))
    return [f"{text} (first at {images:,.0f} samples)" for text, images in first.items()]


def _probes(run: RunRecord) -> list[Any]:
    """The telemetry lines that can be drawn: those whose blocks are like the newest one's, MOST_PROBES of them."""
    lines = [line for line in run.of_kind("telemetry") if _uses(line)]
    lines = [line for line in lines if _uses(line) == _uses(lines[-1])]
    return [lines[place] for place in evenly(len(lines), MOST_PROBES)]


def _uses(line: Any) -> list[tuple[int, int, int]]:
    """(stage, block, loop) of every row; empty for a record of another format."""
    try:
        return [(int(b["stage"]), int(b["block"]), int(loop)) for b in line["blocks"] for loop in b["loops"]]
    except (KeyError, TypeError, ValueError):
        return []


def _values(line: Any, name: str, count: int) -> Floats:
    """A column of the heat map: one value a use."""
    column: list[float] = []
    for block in line["blocks"]:
        values = block.get(name) or [None] * len(block["loops"])
        column += [number(value) for value in values]
    return np.array(column) if len(column) == count else np.full(count, np.nan)


def _figure(run: RunRecord, index: int) -> Chart:
    lines = _probes(run)
    uses = _uses(lines[0])
    grids = {name: np.stack([_values(line, name, len(uses)) for line in lines], axis=1) for name in PANELS}
    grids = {name: grid for name, grid in grids.items() if np.isfinite(grid).any()}
    images = [float(line["images"]) for line in lines]
    caption = Caption(
        name=f"health_{index}",
        title=f"Depth health of {printable(run.name, MOST_TITLE)}",
        text=f"Rows: the {len(uses)} probed block applications, first to last; lines separate the stages. Columns: "
        f"samples seen, {compact(images[0])} to {compact(images[-1])}. Grey: not a number.",
        x_label="samples seen",
    )
    rows = -(-len(grids) // 2)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES * rows), facecolor=PAPER)
        figure.subplots_adjust(left=0.02, right=0.9, bottom=0.02, top=1 - 0.24 / (PANEL_INCHES * rows), wspace=0.34)
        for place, (name, grid) in enumerate(grids.items()):
            _panel(figure, (rows, 2, place + 1), PANELS[name], grid, uses)
        table: list[tuple[object, ...]] = [("images", "stage", "block", "loop", *grids)]
        for column, seen in enumerate(images):
            for row, use in enumerate(uses):
                table.append((int(seen), *use, *(f"{grid[row, column]:.6g}" for grid in grids.values())))
        return finish(figure, caption, table)


def _panel(
    figure: Figure,
    place: tuple[int, int, int],
    panel: tuple[str, bool],
    grid: Floats,
    uses: Sequence[tuple[int, int, int]],
) -> None:
    title, is_logarithmic = panel
    axes = figure.add_subplot(*place)
    axes.set_title(title, loc="left", fontsize=8.5, color=MUTED, pad=3)
    finite = grid[np.isfinite(grid) & (grid > 0)] if is_logarithmic else grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    # Values within 1 % of each other are one colour: rounding must not look like a pattern.
    high = max(high, low * 1.01 if low > 0 else low + 0.01)
    is_logarithmic = is_logarithmic and low > 0
    norm = (LogNorm if is_logarithmic else Normalize)(vmin=low, vmax=high)
    colours = mpl.colormaps["viridis"].with_extremes(bad="#9aa1a9")
    shown = np.where(grid > 0, grid, np.nan) if is_logarithmic else grid
    drawn = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
    for row in range(1, len(uses)):
        if uses[row][0] != uses[row - 1][0]:
            axes.axhline(row - 0.5, color=PAPER, linewidth=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.07, pad=0.03, ticks=[low, high])
    bar.minorticks_off()
    bar.ax.set_yticklabels([printable(f"{value:.2g}", 8) for value in (low, high)], fontsize=7.5)
    bar.outline.set_visible(False)
