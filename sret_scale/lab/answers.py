"""What a run answered for every sample of a split: one by one, by class, as a matrix, and its surest mistakes.

An answer is (index of the sample, predicted class, its probability, the probability of the sample's own class).
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm

from data_pipelines.atomic_files import write_whole
from data_pipelines.shards.index import ShardSet
from data_pipelines.upkeep.contact_sheet import draw_rows
from sret_scale.lab.report.chart import STYLE, Caption, Chart, canvas, colour_bar, csv_text, finish, printable

Answers = Sequence[tuple[float, float, float, float]]
NUM_MISTAKES = 48
MOST_CLASSES = 4096
"""More make a matrix that takes gigabytes and shows nothing."""
_NAMED = 32
_INCHES = 4.8


def write_predictions(file: Path, shards: ShardSet, answers: Answers) -> None:
    """A row a sample, in the order of the shards."""
    names, rows = shards.class_names, []
    for index, predicted, probability, own in answers:
        row = int(index)
        place = (shards.shard_names[int(shards.shard_of[row])], shards.key(row), names[int(shards.label[row])])
        rows.append((*place, names[int(predicted)], f"{probability:.6f}", f"{own:.6f}"))
    header = ("shard", "key", "class", "predicted", "probability", "class_probability")
    write_whole(file, csv_text([header, *rows]))


def write_details(folder: Path, shards: ShardSet, answers: Answers) -> list[Path]:
    """classes.csv, confusion.svg, .png and .csv, and, where there are any, mistakes.png; returns these files."""
    folder.mkdir(parents=True, exist_ok=True)
    names, number = shards.class_names, shards.num_classes
    table = np.array(answers)
    index, predicted = table[:, 0].astype(int), table[:, 1].astype(int)
    label = shards.label[index].astype(int)
    is_right = label == predicted
    totals, right = np.bincount(label, minlength=number), np.bincount(label[is_right], minlength=number)
    files = [folder / "classes.csv"]
    shares = ((name, n, f"{hits / n:.6f}" if n else "") for name, n, hits in zip(names, totals, right, strict=True))
    write_whole(files[0], csv_text([("class", "num_samples", "top1"), *shares]))
    if number <= MOST_CLASSES:
        counts_CC = np.bincount(label * number + predicted, minlength=number**2).reshape(number, number)
        files += confusion_figure(counts_CC, names).write(folder)
    surest = [row for row in np.argsort(-table[:, 2], kind="stable") if not is_right[row]][:NUM_MISTAKES]
    if surest:
        files.append(folder / "mistakes.png")
        captions = {
            int(index[row]): f"{names[label[row]]}\n{table[row, 2]:.0%} {names[predicted[row]]}" for row in surest
        }
        draw_rows(shards, captions).save(files[-1], "PNG")
    return files


def confusion_figure(counts_CC: np.ndarray, names: Sequence[str]) -> Chart:
    """Samples of each class (rows) by what they were taken for (columns)."""
    caption = Caption(
        name="confusion",
        title="Confusion",
        text="Samples of each class by what they were taken for; on the diagonal they are right.",
        x_label="predicted",
        y_label="class",
    )
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = canvas(caption, _INCHES)
        figure.subplots_adjust(left=0.24, right=0.88, bottom=0.24, top=0.92)
        colours = mpl.colormaps["viridis"].with_extremes(bad="white")
        norm = LogNorm(1, max(2, counts_CC.max()))
        drawn = axes.imshow(np.ma.masked_equal(counts_CC, 0), norm=norm, cmap=colours, interpolation="nearest")
        if len(names) <= _NAMED:
            shown = [printable(name, 18) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), shown, fontsize=7)
            for row, column in zip(*np.nonzero(counts_CC), strict=True):
                ink = "black" if norm(counts_CC[row, column]) > 0.6 else "white"
                axes.text(column, row, str(counts_CC[row, column]), ha="center", va="center", fontsize=6, color=ink)
        colour_bar(figure, axes, drawn)
        table: list[tuple[object, ...]] = [("class", *names)]
        return finish(figure, caption, table + [(name, *row) for name, row in zip(names, counts_CC, strict=True)])
