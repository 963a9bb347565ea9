"""The figures of the analyses, in the report's style: SVG, PNG and CSV each."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sret_scale.lab.analysis.landscape import Landscape
from sret_scale.lab.analysis.loop_worth import LoopStudy
from sret_scale.lab.analysis.similarity import Similarity
from sret_scale.lab.report.chart import (
    HEIGHT_INCHES,
    MUTED,
    PALETTE,
    PAPER,
    STYLE,
    WIDTH_INCHES,
    Caption,
    Chart,
    canvas,
    colour_bar,
    finish,
    printable,
    run_colours,
)

SQUARE_INCHES = 4.4


def landscape_figures(surfaces: Sequence[Landscape]) -> list[Chart]:
    """A surface for each run, and for several the slices along the first direction in one figure."""
    charts = [_surface(surface, index) for index, surface in enumerate(surfaces)]
    return charts + ([_slices(surfaces)] if len(surfaces) > 1 else [])


def _surface(surface: Landscape, index: int) -> Chart:
    caption = Caption(
        name=f"landscape_{index}",
        title=f"Loss around {surface.name}",
        text=f"Cross-entropy at {surface.applications} applications along two filter-normalised random directions; "
        "1 is a step as long as the weights. Grey: not finite.",
        x_label="second direction",
        y_label="first direction",
    )
    finite = surface.loss[np.isfinite(surface.loss) & (surface.loss > 0)]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = canvas(caption, SQUARE_INCHES)
        figure.subplots_adjust(left=0.1, right=0.86, bottom=0.11, top=0.92)
        norm = LogNorm(finite.min(), finite.max()) if len(finite) and finite.max() > finite.min() else Normalize()
        colours = mpl.colormaps["viridis"].with_extremes(bad="#9aa1a9")
        reach = float(surface.along[-1])
        half = reach / (len(surface.along) - 1)
        extent = (-reach - half, reach + half, -reach - half, reach + half)
        drawn = axes.imshow(surface.loss, origin="lower", extent=extent, norm=norm, cmap=colours, aspect="auto")
        if len(finite) and finite.max() > finite.min():
            levels = np.geomspace(finite.min(), finite.max(), 9)[1:-1]
            axes.contour(surface.along, surface.along, surface.loss, levels=levels, colors=PAPER, linewidths=0.7)
        axes.plot(0, 0, "+", color=PAPER, markersize=9)
        colour_bar(figure, axes, drawn)
        table: list[tuple[object, ...]] = [("first", "second", "loss", "top1")]
        for i, a in enumerate(surface.along):
            table += [(a, b, surface.loss[i, j], surface.top1[i, j]) for j, b in enumerate(surface.along)]
        return finish(figure, caption, table)


def _slices(surfaces: Sequence[Landscape]) -> Chart:
    caption = Caption(
        name="landscape_slices",
        title="Loss along the first direction",
        text="The narrower a curve, the sharper the minimum.",
        x_label="first direction",
        y_label="loss, nats",
    )
    table: list[tuple[object, ...]] = [("run", "applications", "first", "loss")]
    legend_inches = 0.2 * len(surfaces) + 0.1
    with mpl.rc_context(STYLE):
        figure, axes = canvas(caption, HEIGHT_INCHES + legend_inches)
        height = HEIGHT_INCHES + legend_inches
        figure.subplots_adjust(left=0.11, right=0.95, bottom=(0.46 + legend_inches) / height, top=1 - 0.36 / height)
        for surface, colour in zip(surfaces, run_colours(len(surfaces)), strict=True):
            loss = surface.loss[:, len(surface.along) // 2]
            label = printable(f"{surface.applications} applications: {surface.name}", 60)
            axes.plot(surface.along, loss, color=colour, label=label)
            pairs = zip(surface.along, loss, strict=True)
            table += [(surface.name, surface.applications, along, value) for along, value in pairs]
        axes.set_yscale("log")
        figure.legend(frameon=False, fontsize=8.5, labelcolor=MUTED, loc="lower left", borderaxespad=0.2)
        return finish(figure, caption, table)


def similarity_figure(found: Similarity, index: int) -> Chart:
    """The matrix of CKA between loops, stages apart."""
    caption = Caption(
        name=f"similarity_{index}",
        title=f"Similarity of loops in {found.name}",
        text=f"Linear CKA between the streams after {len(found.uses)} uses of blocks, first at the top; lines separate "
        "the stages. At 1, the loops in between did nothing but rotate or scale the stream.",
        x_label="use of a block",
        y_label="use of a block",
    )
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = canvas(caption, SQUARE_INCHES)
        figure.subplots_adjust(left=0.1, right=0.86, bottom=0.11, top=0.92)
        colours = mpl.colormaps["viridis"].with_extremes(bad="#9aa1a9")
        drawn = axes.imshow(found.cka, vmin=0, vmax=1, cmap=colours, interpolation="nearest", aspect="auto")
        for place in range(1, len(found.uses)):
            if found.uses[place][0] != found.uses[place - 1][0]:
                axes.axhline(place - 0.5, color=PAPER, linewidth=1.2)
                axes.axvline(place - 0.5, color=PAPER, linewidth=1.2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        colour_bar(figure, axes, drawn)
        table: list[tuple[object, ...]] = [
            ("stage", "block", "loop", "other_stage", "other_block", "other_loop", "cka")
        ]
        for i, one in enumerate(found.uses):
            table += [(*one, *other, found.cka[i, j]) for j, other in enumerate(found.uses)]
        return finish(figure, caption, table)


def loop_figure(study: LoopStudy, index: int) -> Chart:
    """Accuracy after each change of a loop, a panel a stage, with the unchanged accuracy as a line."""
    stages = sorted({effect.stage for effect in study.effects})
    caption = Caption(
        name=f"loops_{index}",
        title=f"What each loop of {study.name} is worth",
        text=f"Top-1 with one loop of all blocks of a stage left out, run twice, or swapped with the next. Dashed: the "
        f"unchanged model, {100 * study.top1:.1f} %.",
        x_label="loop",
        y_label="top-1, %",
    )
    height = 0.7 + 1.7 * len(stages)
    colours = dict(zip(("left out", "repeated", "swapped"), PALETTE, strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=PAPER)
        figure.subplots_adjust(left=0.1, right=0.97, bottom=0.62 / height, top=1 - 0.28 / height, hspace=0.45)
        for place, stage in enumerate(stages):
            axes = figure.add_subplot(len(stages), 1, place + 1)
            axes.set_title(f"stage {stage}: top-1, %", loc="left", fontsize=8.5, color=MUTED, pad=3)
            axes.axhline(100 * study.top1, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
            for change, colour in colours.items():
                own = [(e.loop, 100 * e.top1) for e in study.effects if (e.stage, e.change) == (stage, change)]
                if own:
                    label = change if place == 0 else None
                    axes.plot(*zip(*own, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.0, label=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("loop")
        figure.legend(frameon=False, fontsize=8.5, labelcolor=MUTED, loc="lower left", ncols=3, borderaxespad=0.2)
        table: list[tuple[object, ...]] = [
            ("stage", "loop", "change", "top1", "loss"),
            ("", "", "none", study.top1, study.loss),
        ]
        table += [(e.stage, e.loop, e.change, e.top1, e.loss) for e in study.effects]
        return finish(figure, caption, table)
