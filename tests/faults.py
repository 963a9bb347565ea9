"""The fault suite: `python -m tests.faults` (25 minutes on two cores), `--short` for what fits into the test run.

Each fault ends in one line of a table: what was done, how often, and how often it came out as if nothing had happened.
`docs/reliability.md` holds the figures of the last full run.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sret_scale.train.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_valid,
    read_state,
    read_tensors,
    verify_checkpoint,
)
from tests.runs import complete_lines, digest, rank_processes, wait_for_images
from tests.tiny import ROOT, sret_scale, tiny_config, tiny_shards, write_config

SAVING_CALLS = "openat,write,pwrite64,ftruncate,fsync,rename,mkdir,unlinkat,rmdir"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table."""

    fault: str
    num_tried: int
    num_survived: int
    note: str = ""


def saving_calls(folder: Path) -> list[tuple[str, int]]:
    """(system call, its number among those of its name) for every call of one save that touches the checkpoints."""
    trace = folder.parent / "trace.txt"
    run = subprocess.run(
        ["strace", "-f", "-y", "-o", str(trace), "-e", f"trace={SAVING_CALLS}", *save_command(folder, 2)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # strace counts the calls of each thread by itself.
    calls: Counter[tuple[str, str]] = Counter()
    points = []
    for line in trace.read_text().splitlines():
        match = re.match(r"(\d+)\s+(\w+)\(", line)
        if match:
            calls[thread_and_name := match.groups()] += 1
            if str(folder) in line:
                points.append((match.group(2), calls[thread_and_name]))
    return points


def save_command(folder: Path, step: int) -> list[str]:
    return [sys.executable, "-m", "tests.save_once", str(folder), str(step)]


def state_of(folder: Path) -> int:
    """The step of the newest whole checkpoint, after checking that its tensors are those of that step."""
    path = newest_valid(folder, lambda _text: None)
    assert path is not None
    step = int(read_state(path)["step"])
    assert bool((read_tensors(path, "weights")["a"] == step).all())
    return step


def crashes_while_saving(work: Path, chance: random.Random, most: int | None, fault: str) -> Outcome:
    """A kill (`signal=KILL`) or an error (`error=EIO`) at every file-system call of one save."""
    first = work / "first"
    assert subprocess.run(save_command(first, 1), cwd=ROOT, check=False).returncode == 0
    counted = work / "counted"
    shutil.copytree(first, counted)
    points = saving_calls(counted)
    assert len(points) > 10
    if most is not None:
        points = sorted(chance.sample(points, min(most, len(points))))
    survived = 0
    for name, number in points:
        folder = work / "counted"  # the same path, because the number of calls depends on nothing else
        shutil.rmtree(folder)
        shutil.copytree(first, folder)
        inject = ("-e", f"trace={SAVING_CALLS}", "-e", f"inject={name}:{fault}:when={number}")
        run = subprocess.run(
            ["strace", "-f", "-o", "/dev/null", *inject, *save_command(folder, 2)],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        assert run.returncode != 0 or "error" in fault, f"{name} {number} was not reached"
        survived += state_of(folder) in (1, 2)
    shutil.rmtree(work / "counted")
    shutil.rmtree(first)
    return Outcome(fault=f"{fault} at a file-system call of a save", num_tried=len(points), num_survived=survived)


def mutations(work: Path, chance: random.Random, count: int) -> Outcome:
    """Bit flips, truncations and deletions of the newest checkpoint: found, and the one before is used."""
    found = 0
    for _ in range(count):
        folder = work / "mutated"
        for step in (1, 2):
            subprocess_free_save(folder, step)
        target = chance.choice(sorted(list_checkpoints(folder)[0].iterdir()))
        content = bytearray(target.read_bytes())
        kind = chance.choice(("flip", "cut", "delete"))
        if kind == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            target.write_bytes(content)
        elif kind == "cut":
            target.write_bytes(content[: chance.randrange(len(content))])
        else:
            target.unlink()
        try:
            verify_checkpoint(list_checkpoints(folder)[0])
        except CheckpointError:
            found += state_of(folder) == 1
        shutil.rmtree(folder)
    return Outcome(fault="mutations of the newest checkpoint", num_tried=count, num_survived=found)


def subprocess_free_save(folder: Path, step: int) -> None:
    """As tests.save_once, in this process, keeping both."""
    import torch

    from sret_scale.train.checkpoint import save_checkpoint

    tensors = {"weights": {"a": torch.full((64, 64), float(step))}}
    save_checkpoint(folder, step=step, tensors=tensors, state={"images": step})


def kills(work: Path, chance: random.Random, count: int) -> Outcome:
    """kill -9 of random ranks at random steps, until the run has been killed `count` times; the digests must agree."""
    shards = tiny_shards(work / "data")
    interval = 64
    images = interval * (count + 2)
    config = write_config(
        work / "tiny.yaml", tiny_config(shards), total_images=images, checkpoint_interval_images=interval
    )
    left_alone, killed = work / "left_alone", work / "killed"
    assert sret_scale("train", config, "--run", left_alone, cwd=work).wait(600) == 0
    for kill in range(count):
        process = sret_scale("train", config, "--run", killed, cwd=work)
        wait_for_images(killed, interval * kill + 32 * chance.randrange(1, 4), process)
        time.sleep(chance.random() * 0.1)
        victims = rank_processes(process)
        (chance.choice(victims) if victims else process).kill()
        process.communicate(timeout=120)
        assert process.returncode != 0
    assert sret_scale("train", config, "--run", killed, cwd=work).wait(600) == 0
    same = digest(killed) == digest(left_alone)
    return Outcome(fault="kill -9 of a random rank at a random step", num_tried=count, num_survived=count * same)


def other_world_sizes(work: Path) -> Outcome:
    """2 -> 1 -> 4 -> 2 ranks in the middle of epochs: every start continues where the last one stopped."""
    shards = tiny_shards(work / "worlds")
    config = write_config(work / "worlds.yaml", tiny_config(shards), total_images=512, checkpoint_interval_images=0)
    run, survived = work / "worlds_run", 0
    for number, ranks in enumerate((2, 1, 4, 2)):
        process = sret_scale("train", config, "--run", run, "--ranks", str(ranks), cwd=work)
        if number < 3:
            wait_for_images(run, 96 * (number + 1), process)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
        survived += process.returncode == (85 if number < 3 else 0)
    images = [line["images"] for line in complete_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    assert images == list(range(32, 513, 32)), images
    return Outcome(fault="another number of ranks (2, 1, 4, 2)", num_tried=4, num_survived=survived)


def chaos(work: Path, chance: random.Random, seconds: float) -> Outcome:
    """A kill every 20 s or so: the share of time that went into steps that were kept."""
    shards = tiny_shards(work / "chaos")
    config = write_config(work / "chaos.yaml", tiny_config(shards), total_images=10**7, checkpoint_interval_images=320)
    run, started, num_kills = work / "chaos_run", time.monotonic(), 0
    while time.monotonic() - started < seconds:
        process = sret_scale("train", config, "--run", run, cwd=work)
        time.sleep(20 * (0.75 + 0.5 * chance.random()))
        victims = rank_processes(process)
        (chance.choice(victims) if victims else process).kill()
        process.communicate(timeout=120)
        num_kills += 1
    kept = read_state(list_checkpoints(run / "checkpoints")[0])
    useful = kept["time_s"] / (time.monotonic() - started)
    return Outcome(
        fault="chaos: a kill every 20 s",
        num_tried=num_kills,
        num_survived=num_kills if kept["images"] > 0 else 0,
        note=f"{useful:.0%} of {seconds:.0f} s useful",
    )


def suite(work: Path, chance: random.Random, *, is_short: bool) -> Iterator[Callable[[], Outcome]]:
    """The faults in turn."""
    most = 6 if is_short else None
    yield lambda: crashes_while_saving(work, chance, most, "signal=KILL")
    yield lambda: crashes_while_saving(work, chance, most, "error=EIO")
    yield lambda: mutations(work, chance, 20 if is_short else 200)
    if not is_short:
        yield lambda: kills(work, chance, 20)
        yield lambda: other_world_sizes(work)
        yield lambda: chaos(work, chance, 300)


def main() -> int:
    """Print the table; 1 when a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, has_failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as work:
        for fault in suite(Path(work), chance, is_short=args.short):
            started = time.monotonic()
            outcome = fault()
            has_failed |= outcome.num_survived != outcome.num_tried
            print(
                f"{outcome.fault:<46} {outcome.num_survived:>4} of {outcome.num_tried:<4} "
                f"{time.monotonic() - started:6.0f} s  {outcome.note}",
                flush=True,
            )
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
