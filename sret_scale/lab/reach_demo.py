"""The demo of depth: a block learns on small mazes what a source reaches, and reads larger ones by being applied more.

made mazes -> shards -> training at 7 to 11 pixels -> evaluation at 23 after 5 to 300 applications -> page
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from data_pipelines.grids.made import GridOptions
from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import evaluation_batches
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.recipes import recipe
from sret_scale.config.run_config import RunConfig
from sret_scale.lab.depth_curve import curve_table, depth_curve, keep_curve
from sret_scale.lab.report.chart import MUTED, PAPER, STYLE, Caption, Chart, finish
from sret_scale.lab.report.page import write_report
from sret_scale.launch.nodes import choose_nodes
from sret_scale.launch.preflight import start_run
from sret_scale.model import SReT
from sret_scale.model.read_out import read_outs
from sret_scale.model.vision.sret import as_sret
from sret_scale.tasks import task_of
from sret_scale.train.distributed import ranks_from_environment
from sret_scale.train.evaluate_main import load_model_of

APPLICATIONS = [5, 10, 20, 54, 108, 200, 300]
FEW, MANY = 54, 300
SHOWN = [10, FEW, 108, 200, MANY]
TRAINED, TESTED = 11, 23
"""Pixels a side of the largest mazes that the model learns from, and of those that it is tested on."""
MOST_LOOPS = 120
"""Of a step of training: about three times the longest way in such a maze."""
MAZES = {
    "train": GridOptions(puzzle="reach", count=6000, smallest=7, largest=TRAINED, seed=0),
    "validation": GridOptions(puzzle="reach", count=96, smallest=TRAINED, largest=TRAINED, seed=1),
    "test": GridOptions(puzzle="reach", count=60, smallest=TESTED, largest=TESTED, seed=2),
}


def reach_config(output: Path, num_ranks: int) -> RunConfig:
    """The recipe `reach` on smaller mazes, whose longest ways are shorter."""
    config, shards = recipe("reach").config, output / "shards"
    stage = replace(config.model.stages[0], num_loops=MOST_LOOPS)
    return replace(
        config,
        model=replace(config.vision, stages=(stage,), image_size=TRAINED),
        data=replace(config.data, train_folder=str(shards / "train"), test_folder=str(shards / "validation")),
        depth=replace(config.depth, max_loops=MOST_LOOPS),
        train=replace(config.train, total_images=22_400, micro_batch_size=min(8, 16 // num_ranks)),
    )


def run_reach_demo(output: Path) -> int:
    """Everything into `output`, skipping what is there; the exit status of training where that failed, else 0."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    for name, options in MAZES.items():
        say(f"{options.count:,} mazes of {options.smallest} to {options.largest} pixels: {output / 'shards' / name}")
        write_shards(WriteConfig(kind="mazes", source=options, seed=None, shard_samples=2000), output / "shards" / name)
    num_ranks = max(number for number in (1, 2, 4, 8, 16) if number <= sum(choose_nodes().ranks_of_nodes))
    config, run, test = reach_config(output, num_ranks), output / "model", output / "shards" / "test"
    say(f"one block learns from {config.train.total_images:,} of them: {run}")
    status = start_run(config, run, num_ranks=num_ranks)
    if status:
        return status
    say(f"the same weights on mazes of {TESTED} pixels, applied {APPLICATIONS[0]} to {APPLICATIONS[-1]} times")
    asked = {"run": str(run), "shards": str(test), "weights": None, "image_size": TESTED, "applications": APPLICATIONS}
    line = depth_curve(asked, ranks_from_environment())
    files = keep_curve(run, line, output)
    print(curve_table(line))
    beliefs = strip(as_sret(load_model_of(run, None, None, TESTED)[0], "the demo"), config, test)
    files += beliefs.write(output)
    note = f"Trained on mazes of 7 to {TRAINED} pixels; the strip and the curves are of {TESTED}. One seed, few mazes."
    write_report([run], output / "report.html", note=note, first=[beliefs])
    say(f"page: {output / 'report.html'}, figures: {', '.join(str(file) for file in files if file.suffix == '.png')}")
    print("\n".join(in_three_lines(line)))
    return 0


def in_three_lines(line: dict[str, Any]) -> list[str]:
    """What a curve shows, for who reads nothing else."""
    exact = {point["applications"]: point["exact"] for point in line["points"] if point["read_out"] == "last"}
    return [
        f"One block of {line['parameters']:,} weights learned on mazes of at most {TRAINED} x {TRAINED} pixels to say "
        "which places can be reached.",
        f"On mazes of {TESTED} x {TESTED}, larger than any it has seen, it gets {exact[FEW]:.0%} of whole mazes right "
        f"when it is applied {FEW} times, and {exact[MANY]:.0%} when it is applied {MANY} times.",
        "Nothing else differs, neither weights nor training: here depth is how far the model can see.",
    ]


def strip(model: SReT, config: RunConfig, shards: Path) -> Chart:
    """The maze with the longest way of a small set, and what a model of its size believes of it by and by."""
    config = replace(config, model=model.config)
    size = {"image_size": model.config.image_size, "batch_size": MAZES["test"].count}
    batch = next(iter(evaluation_batches(open_shards(shards), config.data, rank=0, world_size=1, **size)))
    far_B = batch.maps["distance"].masked_fill(batch.maps["map"] != 1, 0).flatten(1).amax(dim=1)
    row = int(far_B.argmax())
    images_1CHW: Tensor = task_of(config).evaluation_input(batch, batch.images.device)[row : row + 1]
    reads = read_outs(model.with_loops(MANY), images_1CHW, SHOWN)
    panels = {f"{read.loops} applications": read.last.softmax(dim=1)[0, 1].numpy() for read in reads}
    label_HW = batch.maps["map"][row].numpy()
    panels["truth"] = (label_HW == 1).astype(np.float32)
    source_row, source_column = (batch.images[row, 1] == 255).nonzero()[0].tolist()
    caption = Caption(
        name="strip",
        title="What one model believes of one maze",
        text="Blue: reached from the source (the dot); red: cut off; dark: walls. The same weights, applied more and "
        f"more often, and the truth. The longest way has {int(far_B[row])} steps.",
        x_label="",
    )
    colours = mpl.colormaps["RdYlBu"].with_extremes(bad="#4a525c")
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.55 * len(panels), 1.85), facecolor=PAPER)
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.86, wspace=0.04)
        for number, (title, values_HW) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), number, xticks=[], yticks=[])
            axes.imshow(np.ma.masked_where(label_HW == 255, values_HW), cmap=colours, vmin=0, vmax=1)
            axes.plot(source_column, source_row, "o", color="white", markersize=3)
            axes.set_title(title, fontsize=9, color=MUTED, pad=3)
            axes.spines["bottom"].set_visible(False)
        table: list[tuple[object, ...]] = [("row", "column", *panels)]
        for place in np.argwhere(label_HW != 255).tolist():
            table.append((*place, *(float(values_HW[*place]) for values_HW in panels.values())))
        return finish(figure, caption, table)
