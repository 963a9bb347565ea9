"""Carry, a task that only deep training learns: application i reads symbol u_i, the label is the one that was marked.

    python experiments/carry.py runs/carry --applications 108 --gradient 108 54 27 12 --seeds 0 1 2
    python experiments/carry.py runs/carry --applications 1000 --gradient 1000 --schedule planned --budget 8_000_000
    python experiments/carry.py runs/carry --applications 300 --prices

A row has 8 symbols, each equally often in its first half, one of them marked there; what follows is drawn freely. So
whoever does not read the mark knows nothing: chance is 1 in 8, exactly. What an application reads is added to the four
tokens of the state, the symbols times sqrt(108 / N), since N of them add up like a random walk. One tied block,
branches of size 1/N, a frozen skip, one loss at the end. Gradient goes through the last k applications alone. For
k <= N/2 none reaches the write, and what a mark adds begins at zero, so that the head finds nothing of it by chance.

What would refute it, written down before the runs: any k <= N/2 above chance by 3 deviations of 4096 rows (14.05 %), or
k = N that fails in two seeds at 300 applications. With `--budget`, a step that would keep more bytes of activations is
refused. Each run is one line of FOLDER/runs.csv; the same command continues.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.memory import Schedule, plan_chain, run_chain
from sret_scale.memory.planning.instrument import measure_peak
from sret_scale.memory.schedule import none, per_application
from sret_scale.model import SReTConfig, StageConfig
from sret_scale.model.layers import Block
from sret_scale.model.stored_sizes import stored_sizes

SYMBOLS, TOKENS, WIDTH, BATCH, TEST_ROWS = 8, 4, 16, 64, 4096
FIELDS = (
    *("applications", "gradient", "seed", "steps", "mark", "schedule", "budget", "bytes"),
    *("accuracy", "loss", "seconds", "macs"),
)

_TRANSFORM = torch.compile(Block.transform, dynamic=False)


def rows(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(count, length) symbols, (count,) marked places and (count,) labels."""
    half = length // 2 // SYMBOLS * SYMBOLS
    order = torch.rand(count, half, generator=generator).argsort(dim=1)
    symbols = torch.randint(SYMBOLS, (count, length), generator=generator)
    symbols[:, :half] = order % SYMBOLS
    places = torch.randint(half, (count,), generator=generator)
    return symbols, places, symbols.gather(1, places[:, None])[:, 0]


class Reader(nn.Module):
    """One tied block, what it reads, and a head on the mean of the tokens."""

    def __init__(self, applications: int, mark: float) -> None:
        super().__init__()
        stage = StageConfig(
            width=WIDTH,
            num_heads=2,
            num_blocks=1,
            num_loops=applications,
            projections="none",
            branch_scheme="loop_aware",
        )
        config = SReTConfig(stages=(stage,), image_size=16)
        self.block = Block(stage, stored_sizes(config, 0))
        self.scale = math.sqrt(108 / applications)
        self.symbols = nn.Parameter(0.1 * torch.randn(SYMBOLS, WIDTH))
        self.marked = nn.Parameter(mark * torch.randn(SYMBOLS, WIDTH))
        self.start = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-8), nn.Linear(WIDTH, SYMBOLS)

    def links(self, symbols: Tensor, places: Tensor) -> list["Link"]:
        """The applications of a batch of rows."""
        return [Link(self, i, symbols[:, i], places == i) for i in range(symbols.shape[1])]

    def scores(self, state_BND: Tensor) -> Tensor:
        """(B, symbols) of the state at the end."""
        return self.head(self.norm(state_BND.mean(dim=1)))


class Link:
    """One application: it adds what it reads to the state and runs the block."""

    def __init__(self, reader: Reader, loop: int, symbol: Tensor, is_marked: Tensor) -> None:
        self.reader, self.loop = reader, loop
        # A product with a one-hot row: its backward pass adds up in one order.
        self.symbol = F.one_hot(symbol, SYMBOLS).float()
        self.marked = self.symbol * is_marked[:, None]

    def __call__(self, state_BND: Tensor) -> Tensor:
        reader = self.reader
        read_BD = reader.scale * self.symbol @ reader.symbols + self.marked @ reader.marked
        return reader.block(state_BND + read_BD[:, None], self.loop, 1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that a call reads."""
        yield from (self.reader.symbols, self.reader.marked, *self.reader.block.parameters())


def final_state(links: Sequence[Link], start: Tensor, schedule: Schedule) -> Tensor:
    """The state at the end, with gradient through as many applications as the schedule has."""
    cut = len(links) - schedule.num_applications
    with torch.no_grad():
        state = start.detach()
        for link in links[:cut]:
            state = link(state)
    return run_chain(links[cut:], state if cut else start, schedule)


def schedule_of(reader: Reader, gradient: int, kind: str, budget: int | None) -> tuple[Schedule, int]:
    """The schedule of a run and the bytes of activations that a step keeps; ValueError where they are too many."""
    # Rows shorter than twice the symbols have no place for a mark.
    symbols, places, labels = rows(BATCH, max(gradient, 2 * SYMBOLS), torch.Generator().manual_seed(0))
    links = reader.links(symbols, places)[-gradient:]
    if kind == "planned":
        # Within the budget, by what is measured: the loss has bytes of its own.
        schedule = plan_chain(links, torch.zeros(BATCH, TOKENS, WIDTH), 9 * (budget or 0) // 10)
    else:
        schedule = {"none": none, "per_application": per_application}[kind](gradient)

    def step() -> None:
        start = reader.start.expand(BATCH, -1, -1)
        F.cross_entropy(reader.scores(final_state(links, start, schedule)), labels).backward()

    step()
    taken = measure_peak(reader.parameters(), step)
    reader.zero_grad()
    if budget is not None and taken > budget:
        raise ValueError(f"schedule {kind}: expected at most {budget:,} bytes of activations a step, got {taken:,}")
    return schedule, taken


def train(applications: int, gradient: int, seed: int, steps: int, args: argparse.Namespace) -> dict[str, object]:
    """One run, as a line of the table."""
    torch.manual_seed(seed)
    reader, rate = Reader(applications, args.mark), args.rate
    schedule, taken = schedule_of(reader, gradient, args.schedule, args.budget)
    # As `compile_blocks` does for a model: one graph for all applications.
    reader.block.transform = partial(_TRANSFORM, reader.block)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses, started = [], time.process_time()
    for step in range(steps):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        symbols, places, labels = rows(BATCH, applications, generator)
        start = reader.start.expand(BATCH, -1, -1)
        loss = F.cross_entropy(reader.scores(final_state(reader.links(symbols, places), start, schedule)), labels)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 25 == 24:
            print(
                f"  N {applications} k {gradient} seed {seed} step {step + 1} {sum(losses[-25:]) / 25:.3f}", flush=True
            )
    application_macs = TOKENS * (12 * WIDTH * WIDTH + 2 * TOKENS * WIDTH)
    return {
        "applications": applications,
        "gradient": gradient,
        "seed": seed,
        "steps": steps,
        "mark": args.mark,
        "schedule": args.schedule,
        "budget": args.budget or "",
        "bytes": taken,
        "accuracy": accuracy(reader, applications, seed),
        "loss": sum(losses[-25:]) / len(losses[-25:]),
        "seconds": round(time.process_time() - started, 1),
        "macs": BATCH * steps * application_macs * (applications + 2 * gradient),
    }


def prices(applications: int) -> list[dict[str, object]]:
    """What a step with gradient through all applications takes, by schedule, and whether its gradients are the same."""
    found: list[dict[str, object]] = []
    torch.manual_seed(0)
    reader = Reader(applications, 0.0)
    symbols, places, labels = rows(BATCH, applications, torch.Generator().manual_seed(0))
    links, example = reader.links(symbols, places), torch.zeros(BATCH, TOKENS, WIDTH)
    plans = {"none": none(applications), "per_application": per_application(applications)}
    taken: dict[str, int] = {}
    first: list[Tensor | None] = []
    for name in ("none", "per_application", "planned in 1/2", "planned in 1/8", "planned in 1/32"):
        if name not in plans:
            plans[name] = plan_chain(links, example, taken["none"] // int(name.rsplit("/", 1)[1]))

        def step(schedule: Schedule = plans[name]) -> None:
            reader.zero_grad()
            start = reader.start.expand(BATCH, -1, -1)
            F.cross_entropy(reader.scores(final_state(links, start, schedule)), labels).backward()

        step()
        taken[name] = measure_peak(reader.parameters(), step)
        started = time.process_time()
        step()
        seconds, grads = time.process_time() - started, [p.grad for p in reader.parameters()]
        first = first or [None if grad is None else grad.clone() for grad in grads]
        same = all(torch.equal(a, b) for a, b in zip(first, grads, strict=True) if a is not None and b is not None)
        found.append(
            {
                "applications": applications,
                "schedule": name,
                "bytes": taken[name],
                "seconds": round(seconds, 2),
                "same_gradients": same,
            }
        )
        print(found[-1], flush=True)
    return found


@torch.no_grad()
def accuracy(reader: Reader, applications: int, seed: int) -> float:
    """Of rows that were never trained on, in percent."""
    generator = torch.Generator().manual_seed(-1 - seed)
    symbols, places, labels = rows(TEST_ROWS, applications, generator)
    state = reader.start.expand(TEST_ROWS, -1, -1)
    for link in reader.links(symbols, places):
        state = link(state)
    return round(100 * float((reader.scores(state).argmax(dim=1) == labels).float().mean()), 2)


def main() -> None:
    """Make the runs that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--applications", type=int, required=True)
    parser.add_argument("--gradient", type=int, nargs="*", default=[], help="the numbers k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--schedule", choices=("none", "per_application", "planned"), default="none")
    parser.add_argument("--budget", type=int, help="the most bytes of activations that a step may keep")
    parser.add_argument("--mark", type=float, default=0.0, help="size of what a mark adds, before training")
    parser.add_argument("--prices", action="store_true", help="bytes and seconds of a step by schedule, no training")
    parser.add_argument("--equal-flops", action="store_true", help="as many steps as cost what --steps of k = N do")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.prices:
        found = prices(args.applications)
        with (args.folder / f"prices_{args.applications}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0])
            writer.writeheader()
            writer.writerows(found)
    table = args.folder / "runs.csv"
    key = ("applications", "gradient", "seed", "steps", "mark", "schedule", "budget")
    known = list(csv.DictReader(table.open())) if table.exists() else []
    done = {tuple(row[name] for name in key) for row in known}
    for seed in args.seeds:
        for gradient in args.gradient:
            longer = 3 * args.applications / (args.applications + 2 * gradient) if args.equal_flops else 1
            steps = round(args.steps * longer)
            asked = (args.applications, gradient, seed, steps, args.mark, args.schedule, args.budget or "")
            if tuple(map(str, asked)) in done:
                continue
            try:
                row = train(args.applications, gradient, seed, steps, args)
            except ValueError as refused:
                print(refused, flush=True)
                continue
            print(row, flush=True)
            with table.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
