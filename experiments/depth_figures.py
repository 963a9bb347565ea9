"""The pictures of `docs/results.md` on depth, drawn from the tables beside them, and the shares that it quotes.

    python experiments/depth_figures.py docs/results
    python experiments/depth_figures.py docs/results --strip runs/reach/seed_3     # and one maze, of a trained model

Reads reach.csv, reach_oracle.csv, carry.csv and carry_prices.csv; writes depth_reach, depth_horizon and depth_strip.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reach import MODEL, UNREACHED, distances, image_of, tree

from sret_scale.lab.report.chart import GRID, INK, MUTED, PALETTE, PAPER, STYLE
from sret_scale.model import SReT
from sret_scale.model.read_out import read_outs

Row = dict[str, str]
SHOWN, SIDE = (20, 108, 300, 1000), 39


def table(file: Path) -> list[Row]:
    """The rows of a CSV file."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def save(figure: Figure, file: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": file.name}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def panel(figure: Figure, place: int, of: int, x_label: str, y_label: str) -> Axes:
    axes = figure.add_subplot(1, of, place, xlabel=x_label)
    axes.annotate(y_label, (0, 1), color=MUTED, xycoords="axes fraction", xytext=(0, 7), textcoords="offset points")
    return axes


def column(rows: Sequence[Row], *names: str) -> list[list[float]]:
    return [[float(row[name]) for row in rows] for name in names]


def draw_reach(folder: Path) -> None:
    """Reach over applications: a line for each seed, with the oracles."""
    rows = [row for row in table(folder / "reach.csv") if row["side"] == str(SIDE) and float(row["braid"]) == 0]
    figure = Figure(figsize=(9.2, 3.6), facecolor=PAPER)
    names = ("reach", "told_apart")
    labels = ("path length at which 3 pairs of 4 are told apart", "pairs told apart, %, any path length")
    for place, (name, label) in enumerate(zip(names, labels, strict=True), start=1):
        axes = panel(figure, place, 2, "block applications, the same weights", label)
        percent = 1 if name == "reach" else 100
        for oracle, style, text in (("cone", ":", "all that can be seen, searched"), ("flood", "--", "fastest flood")):
            ours = [r for r in table(folder / "reach_oracle.csv") if r["oracle"] == oracle and float(r["braid"]) == 0]
            depth, value = column(ours, "applications", name)
            axes.plot(depth, [percent * v for v in value], style, color=MUTED, linewidth=1.4, label=text)
        for seed, colour in zip(sorted({row["seed"] for row in rows}), PALETTE, strict=False):
            ours = [row for row in rows if row["seed"] == seed]
            depth, value = column(ours, "applications", name)
            axes.plot(depth, [percent * v for v in value], "o-", color=colour, markersize=3, label=f"seed {seed}")
            if name == "reach":
                axes.fill_between(*column(ours, "applications", "reach_low", "reach_high"), color=colour, alpha=0.1)
        axes.set_xlim(0, 520)
        axes.set_ylim(bottom=0 if name == "reach" else 40)
    axes.legend(frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.15, wspace=0.16)
    save(figure, folder / "depth_reach")
    summary(rows)


def summary(rows: Sequence[Row]) -> None:
    """What was written down before, by seed: the quotient of reaches, the far pairs, and the speed of the front."""
    for seed in sorted({row["seed"] for row in rows}):
        ours = {int(row["applications"]): row for row in rows if row["seed"] == seed}
        reached = {count: float(row["reach"]) for count, row in ours.items()}
        longest = max(reached.values())
        moving = [(count, far) for count, far in reached.items() if count >= 20 and far < longest]
        speed, start = np.polyfit(*zip(*moving, strict=True), 1)
        left = [far - speed * count - start for count, far in moving]
        print(
            f"seed {seed}: reach(300) / reach(108) {reached[300] / max(1, reached[108]):.2f}, "
            f"pairs of 96 to 200 at 300 {100 * float(ours[300]['told_apart_96_to_200']):.1f} %, "
            f"{speed:.2f} px an application over {[count for count, _ in moving]} (residual {np.std(left):.0f} px)"
        )


def draw_horizon(folder: Path) -> None:
    """Accuracy over the share of the applications with gradient, and what the whole of them costs by schedule."""
    rows = [row for row in table(folder / "carry.csv") if float(row["mark"]) == 0 and row["schedule"] != ""]
    figure = Figure(figsize=(9.2, 3.6), facecolor=PAPER)
    axes = panel(figure, 1, 2, "applications with gradient, share of all", "right at the end, %")
    counts = sorted({int(row["applications"]) for row in rows})
    for count, colour in zip(counts, PALETTE, strict=False):
        ours = [row for row in rows if int(row["applications"]) == count]
        points = sorted({int(row["gradient"]) for row in ours})
        # A seed may have run with two schedules, to the same digits.
        seeds_of = [{r["seed"]: float(r["accuracy"]) for r in ours if int(r["gradient"]) == k} for k in points]
        means = [np.mean(list(found.values())) for found in seeds_of]
        seeds = len({row["seed"] for row in ours})
        label = f"{count:,} applications ({seeds} seed{'s' * (seeds > 1)})"
        axes.plot([k / count for k in points], means, "-", color=colour, linewidth=1.2, label=label)
        for row in ours:
            axes.plot(int(row["gradient"]) / count, float(row["accuracy"]), "o", color=colour, markersize=3.5)
    axes.axhline(12.5, color=MUTED, linewidth=1, linestyle=":")
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.annotate("only from here on it\nreaches the mark", (0.51, 2), color=MUTED, fontsize=9)
    axes.annotate("chance", (0.02, 14.5), color=MUTED, fontsize=9)
    axes.set_ylim(0, 104)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.0, 0.97))
    axes = panel(figure, 2, 2, "block applications, all with gradient", "bytes of activations of a step, MB")
    priced = table(folder / "carry_prices.csv")
    for name, colour in zip(dict.fromkeys(row["schedule"] for row in priced), (INK, *PALETTE), strict=False):
        ours = [row for row in priced if row["schedule"] == name]
        text = {"none": "without recomputation", "per_application": "per application"}.get(name, name)
        axes.plot(*[column(ours, "applications")[0], [v / 1e6 for v in column(ours, "bytes")[0]]], "o-", color=colour,
                  markersize=3.5, linewidth=1.2, label=text)  # fmt: skip
        last = ours[-1]
        axes.annotate(f"{float(last['seconds']):.1f} s", (float(last["applications"]), float(last["bytes"]) / 1e6),
                      color=colour, fontsize=8, xytext=(5, -3), textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({int(row["applications"]) for row in priced})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"], minor=False)
    axes.minorticks_off()
    axes.set_xlim(right=max(ticks) * 1.35)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.subplots_adjust(left=0.05, right=0.985, top=0.88, bottom=0.15, wspace=0.16)
    save(figure, folder / "depth_horizon")


def draw_strip(folder: Path, trained: Path) -> None:
    """One maze with a long way, and what a model believes of it after so many applications."""
    model = SReT(MODEL)
    model.load_state_dict(torch.load(trained / "model.pt", weights_only=True))
    random, best = np.random.default_rng([SIDE, 1 << 20]), (0, np.empty(0), (0, 0))
    for _ in range(40):
        free = tree(SIDE, random)
        source = tuple(2 * random.integers(SIDE // 2, size=2) + 1)
        passages = np.argwhere(free & (np.add.outer(range(SIDE), range(SIDE)) % 2 == 1))
        free[tuple(passages[random.integers(len(passages))])] = False
        far = distances(free, source)
        cut = (free & (far == UNREACHED)).sum() / free.sum()
        longest = int(far[far < UNREACHED].max())
        if 0.1 < cut < 0.4 and longest > best[0]:
            best = longest, free, source
    longest, free, source = best
    model = model.with_image_size(SIDE).with_loops(max(SHOWN)).eval()
    reads = read_outs(model, torch.from_numpy(image_of(free, source))[None], SHOWN)
    panels = {f"{read.loops:,} applications": read.last.softmax(dim=1)[0, 1].numpy() for read in reads}
    panels["truth"] = (distances(free, source) < UNREACHED).astype(float)
    colours = mpl.colormaps["RdBu"].copy()
    colours.set_bad(INK)
    figure = Figure(figsize=(2.3 * len(panels), 2.55), facecolor=PAPER)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.89, wspace=0.04)
    for place, (title, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place, xticks=[], yticks=[])
        axes.imshow(np.ma.masked_where(~free, values), cmap=colours, vmin=0, vmax=1)
        axes.plot(source[1], source[0], "o", color="white", markeredgecolor=GRID, markersize=5)
        wrong = ((values > 0.5) != (panels["truth"] > 0.5)) & free
        share = "" if title == "truth" else f": {100 * (1 - wrong.sum() / free.sum()):.1f} % right"
        axes.set_title(title + share, fontsize=9, color=MUTED, pad=4)
        axes.grid(visible=False)
    figure.savefig(folder / "depth_strip.png", dpi=120)
    print(f"longest way {longest} px")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strip", type=Path, help="the folder of a trained seed of reach.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with mpl.rc_context(STYLE):
        draw_reach(args.folder)
        draw_horizon(args.folder)
        if args.strip:
            draw_strip(args.folder, args.strip)


if __name__ == "__main__":
    main()
