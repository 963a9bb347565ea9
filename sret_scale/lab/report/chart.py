"""What every figure of the report has in common: paper, ink, the runs' colours, and its finished form.

The SVG keeps its text as text and its colours as CSS variables, so that in the page a figure follows the reader's font
and light or dark scheme. The files beside the page (SVG, PNG, CSV) stand alone, on white.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from sret_scale.lab.readable_numbers import binary_size, compact

INK, MUTED, GRID, PAPER = "#1d2125", "#5d6671", "#e4e7eb", "#ffffff"
# Told apart on white and, by their twins in report.html (--run-0 ...), on near-black, also with red-green blindness.
PALETTE = ("#1f6fb4", "#c8501e", "#16855b", "#8d4db0", "#a87900", "#0d8a99", "#b8336a", "#66707c")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    colour: f"--run-{index}" for index, colour in enumerate(PALETTE)
}
WIDTH_INCHES, HEIGHT_INCHES = 4.8, 3.3
PNG_DPI = 200
FONT = "DejaVu Sans"  # It comes with matplotlib, so that a figure is the same on every machine.
STYLE: dict[Any, Any] = {
    "font.family": [FONT],
    "font.size": 10.0,
    "text.parse_math": False,  # A run may be called `a$b`.
    "svg.fonttype": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """The words around a figure. `name` is its file name; `x_label` and `y_label` carry the units."""

    name: str
    title: str
    text: str
    x_label: str
    y_label: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A finished figure. `svg` and `png` stand alone, `inline_svg` takes font and colours from the page."""

    caption: Caption
    svg: str
    inline_svg: str
    png: bytes
    csv: str

    def write(self, folder: Path) -> list[Path]:
        """Writes the figure as NAME.svg, NAME.png and NAME.csv into `folder`, which is made; returns these files."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"svg": self.svg.encode(), "png": self.png, "csv": self.csv.encode()}
        files = [folder / f"{self.caption.name}.{kind}" for kind in contents]
        for file, content in zip(files, contents.values(), strict=True):
            file.write_bytes(content)
        return files


def run_colours(count: int) -> list[str]:
    """One colour for each run: the palette while it lasts, then a scale from dark to bright, visible on both papers."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    scale = mpl.colormaps["viridis"](np.linspace(0.15, 0.85, count))
    return [mpl.colors.to_hex(rgba) for rgba in scale]


def depth_colours(depths: Sequence[float]) -> list[str]:
    """One colour for each different depth, from dark to bright as it grows."""
    order = sorted(set(depths))
    scale = mpl.colormaps["viridis"](np.linspace(0.1, 0.88, len(order)))
    return [mpl.colors.to_hex(scale[order.index(depth)]) for depth in depths]


def css_colour(colour: str) -> str:
    """The colour for the page: its variable if the page has one, so that it can change with the scheme."""
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def canvas(caption: Caption, height_inches: float = HEIGHT_INCHES) -> tuple[Figure, Axes]:
    """An empty figure with labelled axes. The y label lies above the plot, where it reads without a turn."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), facecolor=PAPER)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_xlabel(caption.x_label)
    above: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 7), "textcoords": "offset points"}
    axes.annotate(caption.y_label, (0, 1), color=MUTED, **above)
    return figure, axes


def canvas_above_legend(caption: Caption, num_labels: int) -> tuple[Figure, Axes]:
    """An empty figure with room for a legend of so many rows below the plot; the labels may be long."""
    legend_inches = 0.2 * num_labels + 0.1 * (num_labels > 0)
    height_inches = HEIGHT_INCHES + legend_inches
    figure, axes = canvas(caption, height_inches)
    bottom, top = (0.46 + legend_inches) / height_inches, 1 - 0.36 / height_inches
    figure.subplots_adjust(left=0.11, right=0.95, bottom=bottom, top=top)
    return figure, axes


def legend(figure: Figure) -> None:
    """Names the labelled lines below the plot."""
    figure.legend(frameon=False, fontsize=8.5, labelcolor=MUTED, loc="lower left", borderaxespad=0.2)


def count_axis(axis: Axis) -> None:
    """Tick labels of a count: 0, 10 k, 20 k."""
    axis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def byte_axis(axis: Axis) -> None:
    """Tick labels of bytes, at whole powers of two: 256 MiB, 512 MiB."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MultipleLocator(2.0 ** np.ceil(np.log2(max(4.0, high - low) / 4))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: binary_size(value)))


def log_count_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic x axis of counts with these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def colour_bar(figure: Figure, axes: Axes, drawn: AxesImage) -> None:
    """What the colours mean, beside the plot: both ends of the scale and its middle."""
    low, high = drawn.get_clim()
    assert low is not None and high is not None
    ticks = np.geomspace(low, high, 3) if isinstance(drawn.norm, LogNorm) else np.linspace(low, high, 3)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.03, ticks=ticks, format="%.3g")
    bar.minorticks_off()
    bar.outline.set_visible(False)


def finish(figure: Figure, caption: Caption, table: list[tuple[object, ...]]) -> Chart:
    """The figure in all its forms; the first row of `table` is its header. Call it inside `rc_context(STYLE)`."""
    buffer, pixels = io.BytesIO(), io.BytesIO()
    # The ids of clip paths are hashes; another salt for each figure keeps them apart within one page.
    with mpl.rc_context({"svg.hashsalt": caption.name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.savefig(pixels, format="png", dpi=PNG_DPI)
    svg = buffer.getvalue().decode()
    # Names may hold a dollar, so nothing is set as mathematics (STYLE): a scale's own formulas would stand there raw.
    assert "mathdefault" not in svg, f"{caption.name}: a tick of a logarithmic scale needs a format"
    inline_svg = _inline(svg, caption)
    return Chart(caption=caption, svg=svg, inline_svg=inline_svg, png=pixels.getvalue(), csv=csv_text(table))


def csv_text(rows: Iterable[tuple[object, ...]]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _inline(svg: str, caption: Caption) -> str:
    """The <svg> element for the page: no fixed size, described for screen readers, colours by the page's variables."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r' (width|height)="[\d.]+pt"', "", body, count=2)
    body = body.replace("<svg", f'<svg role="img" aria-label="{escape(caption.title)}"', 1)
    return re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})", lambda match: match.group(1) + css_colour(match.group(2)), body)


def printable(text: str, length: int) -> str:
    """`text` in one line of at most `length` characters, with a dot for each character that the figures' font lacks."""
    font = mpl.font_manager.get_font(mpl.font_manager.findfont(FONT))
    shown = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "\N{MIDDLE DOT}" for c in text)
    if len(shown) <= length:
        return shown
    # Names of one experiment begin alike: the end tells them apart.
    end = 2 * length // 3
    return shown[: length - 1 - end] + "\N{HORIZONTAL ELLIPSIS}" + shown[-end:]
