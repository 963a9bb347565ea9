"""Reach: how far a tied model of 2,504 parameters reads a maze, by the applications it runs and not by its weights.

    python experiments/reach.py runs/reach --seed 1            # trains, then tests; the same command continues
    python experiments/reach.py runs/reach --seed 1 --test 39 --pairs 100
    python experiments/reach.py runs/reach --seed 1 --test 39 --pairs 100 --braid 0.1     # loops, never trained on

A cell is to be told whether the source reaches it. Mazes are spanning trees (randomised depth-first search) with one
passage closed. Training: 7 to 15 pixels on a canvas of 15. Half of the steps have four mazes of 7 an image, the
others one of 9 to 15. The number of loops before the 8 to 10 with gradient is drawn log-uniformly, from none to three
times the longest path. The loss comes after every second loop with gradient, and leaves out what cannot be known: a
cell that is reached counts once its distance is at most half of the loops done so far, one that is not counts always.

Test: pairs of twins. Both have the same tree, source and target; one closes a passage on the way to the target, the
other one off it, both further than 3 pixels from the target, and their distances and the numbers of cells cut off
differ by a quarter at most. A pair is told apart if the target's score is larger where it is reached: chance is 1 in
2, exactly. Pairs of which the training had a maze, in any of its eight symmetries, are left out; there can be some up
to 15 pixels. With `--braid`, a share of the dead ends of the test's mazes gets a second way out.

What would refute it, written down before the runs: a seed of five whose pairs at distances of 96 to 200 on 39 pixels
are told apart less than three times in four after 300 applications; or four seeds of five whose reach at 300 is less
than twice that at 108. On braided mazes, a second axis of shift: less than twice, in any seed tested.
"""

import argparse
import csv
import json
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.model import SReT, preset
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.model.read_out import read_outs

CANVAS, BATCH, MARGIN, UNREACHED = 15, 16, 3, 1 << 16
COUNTS = (10, 20, 54, 108, 200, 300, 500, 700, 1000)
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
MODEL = preset("reach")


def tree(side: int, random: np.random.Generator, braid: float = 0.0) -> np.ndarray:
    """(side, side) bool, free pixels of a maze; cells at odd places, passages between them.

    braid: the share of dead ends that get a second way out.
    """
    free = np.zeros((side, side), bool)
    cells = side // 2
    stack = [tuple(2 * random.integers(cells, size=2) + 1)]
    free[stack[0]] = True
    while stack:
        row, column = stack[-1]
        ways = [
            (a, b)
            for a, b in STEPS
            if 0 < row + 2 * a < side and 0 < column + 2 * b < side and not free[row + 2 * a, column + 2 * b]
        ]
        if not ways:
            stack.pop()
            continue
        a, b = ways[random.integers(len(ways))]
        free[row + a, column + b] = free[row + 2 * a, column + 2 * b] = True
        stack.append((row + 2 * a, column + 2 * b))
    for row, column in np.argwhere(free) if braid else ():
        walls = [(a, b) for a, b in STEPS if row % 2 and column % 2 and not free[row + a, column + b]]
        inner = [(a, b) for a, b in walls if 0 < row + 2 * a < side and 0 < column + 2 * b < side]
        if len(walls) == 3 and random.random() < braid:
            a, b = inner[random.integers(len(inner))]
            free[row + a, column + b] = True
    return free


def distances(free: np.ndarray, source: tuple[int, int]) -> np.ndarray:
    """Steps from the source to every pixel, `UNREACHED` where there is no way."""
    found = np.full(free.shape, UNREACHED)
    found[source] = 0
    queue = deque([source])
    while queue:
        row, column = queue.popleft()
        for a, b in STEPS:
            place = row + a, column + b
            if free[place] and found[place] == UNREACHED:
                found[place] = found[row, column] + 1
                queue.append(place)
    return found


def image_of(free: np.ndarray, source: tuple[int, int]) -> np.ndarray:
    """(3, side, side): red where it is free, green the source, blue the walls."""
    image = np.stack([free, np.zeros_like(free), ~free]).astype(np.float32)
    image[:, source[0], source[1]] = 0, 1, 0
    return image


def training_batch(step: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images, labels with 255 where nothing is asked, distances, and about the longest path."""
    random = np.random.default_rng([seed, step])
    side = (
        7 if step < 300 or random.random() < 0.5 else int(random.choice(np.arange(9, min(15, 9 + step // 100) + 1, 2)))
    )
    images = np.zeros((BATCH, 3, CANVAS, CANVAS), np.float32)
    images[:, 2] = 1
    far = np.full((BATCH, CANVAS, CANVAS), -1)
    for index in range(BATCH):
        corners = [(a, b) for a in (0, 8) for b in (0, 8)] if side == 7 else [(0, 0)]
        for a, b in corners:
            free = tree(side, random)
            passages = np.argwhere(free & (np.add.outer(range(side), range(side)) % 2 == 1))
            if random.random() < 7 / 8:
                free[tuple(passages[random.integers(len(passages))])] = False
            source = tuple(2 * random.integers(side // 2, size=2) + 1)
            images[index, :, a : a + side, b : b + side] = image_of(free, source)
            far[index, a : a + side, b : b + side] = np.where(free, distances(free, source), -1)
    labels = np.where(far < 1, 255, far < UNREACHED)
    return torch.from_numpy(images), torch.from_numpy(labels).long(), torch.from_numpy(far), longest_path(side)


def longest_path(side: int) -> int:
    """About the longest one in mazes of this side."""
    return int(1.4 * (side // 2) ** 2)


def step_plan(step: int, seed: int, longest: int) -> DepthPlan:
    """The loops of a step."""
    random = np.random.default_rng([seed, step, 1])
    before = int(math.exp(random.uniform(0, math.log(3 * longest)))) - 1
    loops = before + 8 + int(random.integers(3))
    first = before + 2 - (loops - before) % 2
    return DepthPlan((StageDepth(tuple(range(loops)), before),), tuple(range(max(1, first), loops, 2)))


def loss_of(scores: Tensor, labels: Tensor, far: Tensor, loops: int) -> Tensor:
    """Cross-entropy of what can be known after so many loops."""
    unknown = (labels == 1) & (far > loops / 2)
    return F.cross_entropy(scores, labels.masked_fill(unknown, 255), ignore_index=255)


def train(folder: Path, seed: int, steps: int, rate: float) -> None:
    """Train to the end, from where the folder's state is; leaves the average of the weights in `model.pt`."""
    torch.manual_seed(seed)
    model, state = SReT(MODEL).train(), folder / "state.pt"
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    begun, spent = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, begun, spent = saved["average"], saved["step"], saved["seconds"]
    compile_blocks(model)
    started = time.process_time()
    for step in range(begun, steps):
        images, labels, far, longest = training_batch(step, seed)
        plan = step_plan(step, seed, longest)
        scores = model(images, None, [plan])
        ends = [*plan.supervised, len(plan.stages[0].loops)]
        loss = torch.stack([loss_of(one, labels, far, end) for one, end in zip(scores, ends, strict=True)]).mean()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - min(0.995, (step + 1) / (step + 10)))
        if step % 50 == 49 or step + 1 == steps:
            seconds = spent + time.process_time() - started
            record = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save(record | {"step": step + 1, "seconds": seconds}, state)
            right = (scores[-1].argmax(1) == labels)[labels != 255].float().mean()
            print(f"step {step + 1} loss {loss.item():.4f} right {right:.4f} {seconds:.0f} s", flush=True)
    torch.save(average, folder / "model.pt")


def canonical(image: np.ndarray) -> bytes:
    """The same for an image (3, side, side) and its eight symmetries, and different for all others."""
    turned = [np.rot90(image, turns, axes=(1, 2)) for turns in range(4)]
    return min((one > 0).tobytes() for half in turned for one in (half, half[:, :, ::-1]))


def trained_on(side: int, seed: int, steps: int) -> set[bytes]:
    """The mazes of this side that a training has, `canonical`; none beyond its canvas."""
    found = set()
    for step in range(steps) if side <= CANVAS else ():
        images, _, _, longest = training_batch(step, seed)
        if longest == longest_path(side):
            corners = [(a, b) for a in (0, 8) for b in (0, 8)] if side == 7 else [(0, 0)]
            for image in images.numpy():
                found |= {canonical(image[:, a : a + side, b : b + side]) for a, b in corners}
    return found


def twins(side: int, random: np.random.Generator, braid: float = 0.0) -> tuple[np.ndarray, tuple[int, int], int]:
    """(2, 3, side, side) images of a pair, closed on the way first, the target and its distance."""
    while True:
        free = tree(side, random, braid)
        source = tuple(2 * random.integers(side // 2, size=2) + 1)
        far = distances(free, source)
        wanted = 2 * random.integers(1, far[far < UNREACHED].max() // 2 + 1)
        targets = [place for place in np.argwhere(far == wanted) if place[0] % 2 and place[1] % 2]
        if not targets:
            continue
        target = tuple(targets[random.integers(len(targets))])
        passages = [tuple(p) for p in np.argwhere(free & (np.add.outer(range(side), range(side)) % 2 == 1))]
        away = {p: max(abs(p[0] - target[0]), abs(p[1] - target[1])) for p in passages}
        near_source = {p for p in passages if max(abs(p[0] - source[0]), abs(p[1] - source[1])) <= 1}
        options: tuple[list, list] = ([], [])
        for index in random.permutation(len(passages))[:60]:
            passage = passages[index]
            if away[passage] <= MARGIN or passage in near_source:
                continue
            closed = free.copy()
            closed[passage] = False
            after = distances(closed, source)
            cut = int((closed & (after == UNREACHED)).sum())
            options[int(after[target] != UNREACHED)].append((passage, cut))
        for on, on_cut in options[0]:
            for off, off_cut in options[1]:
                sizes, ways = sorted((on_cut, off_cut)), sorted((away[on], away[off]))
                if 4 * (sizes[1] - sizes[0]) <= sizes[1] and 4 * (ways[1] - ways[0]) <= ways[1]:
                    pair = []
                    for passage in (on, off):
                        closed = free.copy()
                        closed[passage] = False
                        pair.append(image_of(closed, source))
                    return np.stack(pair), target, int(far[target])


def test_pairs(side: int, pairs: int, braid: float, known: set[bytes]) -> dict[int, tuple]:
    """Pairs by number, the same for every seed but for those with a maze that is `known`."""
    made = {number: twins(side, np.random.default_rng([side, number]), braid) for number in range(pairs)}
    return {number: one for number, one in made.items() if not known & {canonical(one[0][twin]) for twin in (0, 1)}}


def test(folder: Path, side: int, args: argparse.Namespace) -> None:
    """One record of `test_SIDE.json` a pair and number of applications."""
    model = SReT(MODEL)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    model = model.with_image_size(side).with_loops(args.most).eval()
    compile_blocks(model)
    counts = [count for count in COUNTS if count <= args.most]
    lines, name = [], f"{side}_braid_{args.braid:g}" if args.braid else f"{side}"
    made = list(test_pairs(side, args.pairs, args.braid, trained_on(side, args.seed, args.steps)).items())
    print(f"{args.pairs - len(made)} of {args.pairs} pairs have a maze of the training and are left out", flush=True)
    for first in range(0, len(made), 10):
        part = made[first : first + 10]
        images = torch.from_numpy(np.concatenate([images for _, (images, _, _) in part]))
        for read in read_outs(model, images, counts, mean_of=args.mean_of):
            margins = [(scores[:, 1] - scores[:, 0]).unflatten(0, (-1, 2)) for scores in (read.last, read.mean)]
            for row_of, (number, (_, (row, column), distance)) in enumerate(part):
                values = [float(margin[row_of, twin, row, column]) for margin in margins for twin in (0, 1)]
                lines.append({"pair": number, "distance": distance, "applications": read.loops, "margins": values})
        (folder / f"test_{name}.json").write_text(json.dumps(lines))
    write_table(folder / f"reach_{name}.csv", lines)


def write_table(file: Path, lines: list[dict]) -> None:
    """What the records of a test say, by number of applications, also printed."""
    random, rows = np.random.default_rng(0), []
    for count in sorted({line["applications"] for line in lines}):
        ours = sorted((line["distance"], *told(line["margins"])) for line in lines if line["applications"] == count)
        far = [last for distance, last, _ in ours if 96 <= distance <= 200]
        drawn = [reach(sorted(ours[i] for i in random.integers(len(ours), size=len(ours)))) for _ in range(1000)]
        low, high = map(float, np.quantile(drawn, (0.025, 0.975)))
        rows.append(
            {
                "applications": count,
                "pairs": len(ours),
                "told_apart": round(float(np.mean([last for _, last, _ in ours])), 4),
                "told_apart_mean_read_out": round(float(np.mean([mean for *_, mean in ours])), 4),
                "told_apart_96_to_200": round(float(np.mean(far)), 4) if far else "",
                "reach": reach(ours),
                "reach_low": low,
                "reach_high": high,
            }
        )
        print(rows[-1], flush=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def told(margins: list[float]) -> tuple[float, float]:
    """Whether a pair is told apart, by the last scores and by their mean; half where both are the same."""
    closed, kept, closed_mean, kept_mean = margins
    return (closed < kept) + (closed == kept) / 2, (closed_mean < kept_mean) + (closed_mean == kept_mean) / 2


def reach(pairs: list[tuple[float, float, float]]) -> float:
    """The distance up to which three pairs in four are told apart, by the falling fit of least squares; 0 for none."""
    levels: list[list[float]] = []
    for _, is_told, _ in pairs:
        levels.append([is_told, 1])
        while len(levels) > 1 and levels[-2][0] < levels[-1][0]:
            (late, many), (early, few) = levels.pop(), levels.pop()
            levels.append([(late * many + early * few) / (many + few), many + few])
    fit = np.repeat([level for level, _ in levels], [int(number) for _, number in levels])
    within = np.flatnonzero(fit >= 0.75)
    return float(pairs[within[-1]][0]) if len(within) else 0.0


def main() -> None:
    """Train where that is not done, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--test", type=int, nargs="*", default=[15, 39])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--braid", type=float, default=0.0, help="share of the dead ends of test mazes with a way out")
    parser.add_argument("--most", type=int, choices=COUNTS, default=max(COUNTS), help="applications in the test")
    parser.add_argument("--mean-of", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder / f"seed_{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.pt").exists():
        train(folder, args.seed, args.steps, args.rate)
    for side in args.test:
        test(folder, side, args)


if __name__ == "__main__":
    main()
