"""Snake: a line of symbols, and at every place the product of all up to it. The one task whose cone is its distance.

    python experiments/snake.py runs/snake --group z2 --within 8 16 32 64 --seeds 0
    python experiments/snake.py runs/snake --table docs/results/snake.csv       # what the runs say

The pixels of an image in raster order are a line: 64 of them in training, 256 in the test. A pixel is a generator of
Z2, S3 or A5; a fourth channel marks the first. Slices of 9 along the line, shifted by 4 in every second application:
the model's windows of 3 x 3 places with another table of orders (`LineOrder`). So what a place can know grows by 4.5
places an application, and no weights can change that. One tied block, a norm of the stream after each application.

Trained to be done *within* T applications: the loss asks for place p after m applications if p < 64 m / T, at every
second of the last 8, which have gradient, behind a number without that is drawn log-uniformly from 0 to T.

What would refute it, written down before the runs: the front (how far nine places in ten are right, in a line of 256)
moves v places an application, and v grows with 64 / T with an exponent below 0.5 over T of 16, 32 and 64 (claimed:
1 +- 0.2); or anything better than chance beyond the cone. T of 8 asks for 8 places an application, which the slices
forbid: it is to end below 4.5.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.grids.products import GROUPS, group_table
from sret_scale.model import SReT, SReTConfig, preset
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.read_out import read_outs
from sret_scale.model.stage import Stage
from sret_scale.model.windows import WindowOrder

SIDE, TEST_SIDE, BATCH, GRADED = 8, 16, 32, 8
COUNTS = (4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 300)
SHIFT, SLICE = 4, 9


class LineOrder(WindowOrder):
    """Slices of 9 along the raster instead of squares; shifted ones begin with 4 places of padding."""

    def __init__(self, grid: int) -> None:
        super().__init__(grid, 3)
        place = torch.arange(self.side**2).view(self.side, self.side)
        line, is_padding = place[:grid, :grid].reshape(-1), torch.ones(self.side, self.side, dtype=torch.bool)
        is_padding[:grid, :grid] = False
        padding = place[is_padding]
        shifted = torch.cat([padding[:SHIFT], line, padding[SHIFT:]])
        self.orders = torch.stack([torch.cat([line, padding]), shifted])


def config_of(group: str, within: int, width: int) -> SReTConfig:
    """The model of `reach.py` for these lines."""
    classes = len(group_table(group))
    return preset("reach", num_classes=classes, image_size=SIDE, in_channels=4, width=width, num_loops=2 * within)


def as_line(model: SReT) -> SReT:
    """The same model with its slices along the line."""
    stage = cast(Stage, model.stages[0])
    stage.windows = stage.permutations = LineOrder(model.config.image_size)
    return model


def cone_of(count: int) -> int:
    """How many places, from the first on, can have all that they need after `count` applications."""
    return sum(SLICE - SHIFT if number % 2 else SHIFT for number in range(1, count)) + SLICE if count else 0


def lines(group: str, count: int, side: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(count, 4, side, side) images and (count, side, side) labels."""
    table = group_table(group)
    elements = list(table)
    step = torch.tensor([[elements.index(one) for one in table[element]] for element in elements])
    symbols = torch.from_numpy(random.integers(len(GROUPS[group]), size=(count, side * side)))
    label, element = torch.empty_like(symbols), torch.full((count,), elements.index(GROUPS[group][0]))
    for place in range(side * side):
        label[:, place] = element = step[element, symbols[:, place]]
    first = (torch.arange(side * side) == 0).float().expand(count, 1, -1)
    images = torch.cat([F.one_hot(symbols, 3).float().transpose(1, 2), first], dim=1).view(count, 4, side, side)
    return images, label.view(count, side, side)


def train(folder: Path, group: str, within: int, seed: int, args: argparse.Namespace) -> None:
    """Train to the end, from where the folder's state is; leaves `model.pt`."""
    torch.manual_seed(seed)
    model = SReT(config_of(group, within, args.width)).train()
    as_line(model)
    compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    begun, spent, state = 0, 0.0, folder / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun, spent = saved["step"], saved["seconds"]
    started, place = time.process_time(), torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    for step in range(begun, args.steps):
        random = np.random.default_rng([seed, step])
        images, labels = lines(group, BATCH, SIDE, random)
        before = int(math.exp(random.uniform(0, math.log(within + 1)))) - 1
        loops = before + GRADED
        plan = DepthPlan((StageDepth(tuple(range(loops)), before),), tuple(range(before + 2, loops, 2)))
        losses = []
        for scores, end in zip(model(images, None, [plan]), [*plan.supervised, loops], strict=True):
            asked = labels.masked_fill(place >= SIDE * SIDE * end / within, 255)
            losses.append(F.cross_entropy(scores, asked, ignore_index=255))
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == args.steps:
            seconds = spent + time.process_time() - started
            record = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(record | {"seconds": seconds}, state)
            print(f"{folder.name} step {step + 1} loss {losses[-1].item():.4f} {seconds:.0f} s", flush=True)
    torch.save(model.state_dict(), folder / "model.pt")


def test(folder: Path, group: str, within: int, seed: int, args: argparse.Namespace) -> None:
    """`test.json`: how many of the lines are right at each place, after each number of applications."""
    model = SReT(config_of(group, within, args.width))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    model = as_line(model.with_image_size(TEST_SIDE).with_loops(max(COUNTS)).eval())
    compile_blocks(model)
    images, labels = lines(group, args.lines, TEST_SIDE, np.random.default_rng(1 << 20))
    found = {
        read.loops: (read.last.argmax(1) == labels).flatten(1).float().mean(0).tolist()
        for read in read_outs(model, images, COUNTS)
    }
    record = {"group": group, "within": within, "seed": seed, "lines": args.lines, "right": found}
    (folder / "test.json").write_text(json.dumps(record))
    print(*table_rows(record, len(group_table(group))), sep="\n", flush=True)


def table_rows(record: dict, classes: int) -> list[dict[str, object]]:
    """A row for each number of applications: front, cone, and accuracy beyond the cone."""
    rows = []
    for count, right in record["right"].items():
        # The first place from which on fewer than nine in ten are right, over nine places.
        means = np.convolve(right, np.ones(9) / 9, mode="valid")
        front = int(np.argmax(means < 0.9)) if (means < 0.9).any() else len(right)
        beyond = right[cone_of(int(count)) :]
        rows.append(
            {
                "group": record["group"],
                "within": record["within"],
                "seed": record["seed"],
                "applications": int(count),
                "lines": record["lines"],
                "front": front,
                "cone": min(len(right), cone_of(int(count))),
                "right_beyond_cone": round(float(np.mean(beyond)), 4) if beyond else "",
                "chance": round(1 / classes, 4),
            }
        )
    return rows


def write_table(folder: Path, file: Path) -> None:
    """All runs, and the places an application at which the front moves, with the exponent over 64 / T."""
    rows = []
    for path in sorted(folder.glob("*/test.json")):
        record = json.loads(path.read_text())
        rows += table_rows(record, len(group_table(record["group"])))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for key in sorted({(row["group"], row["seed"], row["within"]) for row in rows}):
        ours = [row for row in rows if (row["group"], row["seed"], row["within"]) == key]
        moving = [(row["applications"], row["front"]) for row in ours if 0 < row["front"] < TEST_SIDE**2]
        speed = np.polyfit(*zip(*moving, strict=True), 1)[0] if len(moving) > 1 else math.nan
        print(*key, f"{speed:.2f} places an application over {len(moving)} numbers of them")


def main() -> None:
    """Train and test where that is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", choices=sorted(GROUPS), default="z2")
    parser.add_argument("--within", type=int, nargs="*", default=[], help="the numbers T")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for within in args.within:
            folder = args.folder / f"{args.group}_{within}_{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "model.pt").exists():
                train(folder, args.group, within, seed, args)
            if not (folder / "test.json").exists():
                test(folder, args.group, within, seed, args)
    if args.table:
        write_table(args.folder, args.table)


if __name__ == "__main__":
    main()
