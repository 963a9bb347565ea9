"""Every cell of the engine's parity matrix, or as many as there is time for, and a table: `python -m checks.product`.

    python -m checks.product                                    # all 768, then the table
    python -m checks.product --folder DIR --seconds 300         # five minutes' worth; the next call goes on
    python -m checks.product --folder DIR --seconds 0           # the table of what was run so far

DIR/cells.jsonl gets a line for each cell that is run, with the commit. Cells of other commits count as not run, but
come last. Exits with 1 where a cell does not hold or is still to be run.
"""

import argparse
import functools
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checks.matrix import AXES, Cell, Task, all_cells
from tests.tiny import ROOT

Line = dict[str, Any]


def run_cells(folder: Path, cells: Sequence[Cell], *, until_s: float) -> None:
    """Run cells of one world size until `until_s` (Unix time); their lines are added to FOLDER/cells.jsonl.

    Ranks are started once for all of their cells. Two worlds run at a time: ranks that wait for each other leave cores
    idle.
    Raises RuntimeError with the end of its output where a rank fails.
    """
    num_worlds = min(2, len(cells))
    places = [prepare(folder, cells[number::num_worlds], until_s=until_s) for number in range(num_worlds)]
    processes = [process for place in places for process in _start(place, cells[0].world_size)]
    # All of them, whatever the first one's status.
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError("".join(file.read_text()[-3000:] for place in places for file in place.glob("rank*")))


def prepare(folder: Path, cells: Sequence[Cell], *, until_s: float = math.inf) -> Path:
    """A new folder with the task of some ranks, and what they compare with."""
    plain = folder / commit()
    plain.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=plain))
    names = tuple(cell.name for cell in cells)
    out = folder / "cells.jsonl"
    Task(cells=names, plain=str(plain), out=str(out), commit=commit(), until_s=until_s).save(place / "task")
    return place


def _start(place: Path, world_size: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
    processes = []
    for rank in range(world_size):
        mine = {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-W", "ignore", "-m", "checks.matrix", str(place / "task")]
        with (place / f"rank{rank}").open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **mine}, stdout=output, stderr=output)
        processes.append(process)
    return processes


@functools.cache
def commit() -> str:
    """Of the working tree; with + where files of the product or its tests are not as committed."""
    asked = [["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "sret_scale", "tests"]]
    answers = [subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True) for words in asked]
    if any(answer.returncode for answer in answers):
        return "unknown+"
    name, changed = (answer.stdout.strip() for answer in answers)
    return f"{name}+" if changed else name


def run_product(folder: Path, *, seconds: float, world_sizes: Sequence[int] = (1, 2)) -> list[Line]:
    """Run what is still to be run, each world size for its part of the time; the newest line of every cell so far."""
    here, newest = commit(), read_lines(folder)
    cells = [cell for cell in all_cells() if newest.get(cell.name, {}).get("commit") != here]
    # In any order, so that a part of the product is a fair sample of it; what no commit ran comes first.
    random.Random(0).shuffle(cells)
    cells.sort(key=lambda cell: _turn(cell, newest))
    end_s = time.time() + seconds
    for number, world_size in enumerate(world_sizes):
        chosen = [cell for cell in cells if cell.world_size == world_size]
        if chosen and seconds:
            rest_s = end_s - time.time()
            run_cells(folder, chosen, until_s=time.time() + rest_s / (len(world_sizes) - number))
    return [line for line in read_lines(folder).values() if line["commit"] == here]


def _turn(cell: Cell, newest: Collection[str]) -> tuple[bool, bool, bool]:
    """An average follows a training without touching it, so of two cells that only differ in it one comes first."""
    is_twin_run = replace(cell, ema=not cell.ema).name in newest
    return cell.name in newest, is_twin_run, not cell.ema


def read_lines(folder: Path) -> dict[str, Line]:
    """The newest line of every cell that was ever run in this folder."""
    file = folder / "cells.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["cell"]: line for line in lines}


def table(lines: Sequence[Line]) -> str:
    """For each value of each axis: cells run, cells that hold, and the largest differences."""
    found = {line["cell"]: line for line in lines}
    rows = [f"{'':<32}{'cells':>7}{'run':>7}{'hold':>7}{'fp32, largest':>16}{'bf16, of the way':>19}"]
    values = [("all", None)] + [(axis, value) for axis, values in AXES.items() for value in values]
    for axis, value in values:
        cells = [cell for cell in all_cells() if axis == "all" or getattr(cell, axis) == value]
        run = [(cell.precision, found[cell.name]) for cell in cells if cell.name in found]
        holding = sum(not line["problem"] for _, line in run)
        far = max((line["largest"] for precision, line in run if precision == "fp32"), default=math.nan)
        share = max((line["share"] for precision, line in run if precision == "bf16"), default=math.nan)
        name = axis if axis == "all" else f"{axis} = {value}"
        rows.append(f"{name:<32}{len(cells):>7}{len(run):>7}{holding:>7}{far:>16.1e}{share:>18.2%} ")
    cpu_s = sum(line["cpu_s"] for line in lines)
    rows.append(f"processor time of first ranks {cpu_s:,.0f} s")
    rows += [f"does not hold: {line['cell']}: {line['problem']}" for line in lines if line["problem"]]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps what was found; without it all cells are run now")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no cell begins later than that")
    parser.add_argument("--world-size", type=int, nargs="+", choices=AXES["world_size"], default=AXES["world_size"])
    args = parser.parse_args()
    if args.folder and commit().endswith("+"):
        parser.error("--folder keeps what was found by commit: sret_scale and tests must be as committed")
    with tempfile.TemporaryDirectory() as name:
        lines = run_product(args.folder or Path(name), seconds=args.seconds, world_sizes=args.world_size)
    print(table(lines))
    return int(len(lines) < len(all_cells()) or any(line["problem"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
