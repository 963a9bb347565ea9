"""The fault suite: `python -m checks.faults` (20 minutes on two cores), `--reduced` (8), `--short` (less than one).

Each fault ends in one line of a table: what was done, how often, and how often it came out as if nothing had happened.
`docs/reliability.md` holds the figures of the last run, and says of which size it was.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sret_scale.runs.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_valid,
    read_state,
    read_tensors,
    verify_checkpoint,
)
from tests.ranks.save_once import save, tensors
from tests.runs import Process, complete_lines, digest, digest_of, metrics_bytes, rank_processes, wait_for_images
from tests.tiny import ROOT, sret_scale, tiny_config, tiny_shards, write_config

SAVING_CALLS = "openat,write,pwrite64,ftruncate,fsync,rename,mkdir,unlinkat,rmdir"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table."""

    fault: str
    num_tried: int
    num_survived: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of the suite is run; `crash_points` is per fault, None for every call of a save."""

    crash_points: int | None
    num_mutations: int
    num_kills: int = 0
    chaos_s: float = 0.0


SIZES = {
    "full": Size(crash_points=None, num_mutations=200, num_kills=20, chaos_s=300),
    "reduced": Size(crash_points=20, num_mutations=200, num_kills=6, chaos_s=60),
    "short": Size(crash_points=6, num_mutations=20),
}
MIN_USEFUL_RATIO = 0.15
"""Of the time under chaos. A start takes 8 s on two idle cores and 35 s on busy ones; 8 to 16 s of steps follow it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A system call of one save, and its number among those of its name."""

    name: str
    number: int
    is_commit: bool
    """True from the making of the temporary folder to its last name: an error there must be reported."""


class Saver:
    """A process that saves on request, each time in a fork of itself, under strace."""

    def __enter__(self) -> "Saver":
        command = [sys.executable, "-m", "tests.ranks.save_once"]
        self._said = tempfile.TemporaryFile()  # closed in __exit__
        self._server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.communicate()
        self._said.close()

    def said(self) -> str:
        """What the last save wrote to its error output."""
        descriptor = self._said.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, self._start).decode()

    def save(self, folder: Path, step: int, *options: str) -> tuple[int, str]:
        """(exit status of a save of `step`, what `strace OPTIONS` saw of it)."""
        assert self._server.stdin and self._server.stdout
        self._start = os.fstat(self._said.fileno()).st_size
        trace = folder.parent / "trace.txt"
        self._server.stdin.write(f"{folder} {step}\n")
        self._server.stdin.flush()
        child = psutil.Process(int(self._server.stdout.readline()))
        while child.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-o", str(trace), *options, "-p", str(child.pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert strace.stderr and "attached" in (line := strace.stderr.readline()), line
        child.send_signal(signal.SIGCONT)
        status = int(self._server.stdout.readline())
        strace.communicate()
        return status, trace.read_text()


def saving_calls(saver: Saver, folder: Path) -> list[Point]:
    """Every call of one save that touches the checkpoints."""
    status, trace = saver.save(folder, 2, "-e", f"trace={SAVING_CALLS}")
    assert status == 0, trace
    # strace counts the calls of each thread by itself.
    calls: Counter[tuple[str, str]] = Counter()
    points = []
    is_commit = False
    for line in trace.splitlines():
        match = re.match(r"(\d+)\s+(\w+)\(", line)
        if match:
            calls[thread_and_name := (match.group(1), match.group(2))] += 1
            is_commit |= match.group(2) == "mkdir" and ".writing-" in line
            if str(folder) in line:
                points.append(Point(name=match.group(2), number=calls[thread_and_name], is_commit=is_commit))
            is_commit &= match.group(2) != "rename"
    assert sum(point.is_commit for point in points) > 10
    return points


def state_of(folder: Path) -> int:
    """The step of the newest whole checkpoint, after checking that it holds that step and nothing else."""
    path = newest_valid(folder, lambda _text: None)
    assert path is not None
    state = read_state(path)
    step = int(state["step"])
    assert path.name == f"step-{step:09d}"
    assert state["images"] == step
    for one in tensors(step):
        set_name = one.wholes[0].set_name
        saved = read_tensors(path, set_name)
        assert saved.keys() == {"a"}, set_name
        assert torch.equal(saved["a"], one.values), set_name
    return step


def crashes_while_saving(work: Path, chance: random.Random, most: int | None, fault: str) -> Outcome:
    """A kill (`signal=KILL`) or an error (`error=EIO`) at every file-system call of one save, or at `most` of them.

    The error must be reported with the path and the number of bytes.
    """
    first = work / "first"
    save(first, 1)
    # What an earlier crash left, so that cleaning it up is among the calls.
    (first / ".writing-step-000000000").mkdir()
    (first / ".writing-step-000000000" / "state.json").write_text("{")
    counted = work / "counted"  # the same path each time, because the number of calls depends on nothing else
    shutil.copytree(first, counted)
    with Saver() as saver:
        points = saving_calls(saver, counted)
        num_points = len(points)
        if most is not None:
            points = chance.sample(points, min(most, num_points))
        survived = 0
        for point in points:
            shutil.rmtree(counted)
            shutil.copytree(first, counted)
            status = interrupted_save(saver, counted, point, fault)
            if "error" not in fault or point.is_commit:
                assert status != 0, f"{point} failed, and the save did not say so"
            if "error" in fault and point.is_commit:
                said = saver.said()
                assert f"cannot save checkpoint {counted}" in said and "bytes of tensors" in said, said
            # A save that reports success must be the newest state; a failed one may have got that far.
            survived += state_of(counted) in ((2,) if status == 0 else (1, 2))
    shutil.rmtree(counted)
    shutil.rmtree(first)
    return Outcome(
        fault=f"{fault} at a file-system call of a save",
        num_tried=len(points),
        num_survived=survived,
        note=f"of {num_points} calls",
    )


def interrupted_save(saver: Saver, folder: Path, point: Point, fault: str) -> int:
    """The exit status of a save of step 2 with the fault at that point."""
    inject = ("-e", f"trace={SAVING_CALLS}", "-e", f"inject={point.name}:{fault}:when={point.number}")
    status, trace = saver.save(folder, 2, *inject)
    if "error" in fault:
        injected = [line for line in trace.splitlines() if "(INJECTED)" in line]
        assert any(str(folder) in line for line in injected), f"{point} was not reached: {injected}"
    return status


def mutations(work: Path, chance: random.Random, count: int) -> Outcome:
    """Bit flips, truncations and deletions of the newest checkpoint: found, and the one before is used."""
    found = 0
    for _ in range(count):
        folder = work / "mutated"
        for step in (1, 2):
            save(folder, step, keep=2)
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


def kills(work: Path, chance: random.Random, count: int) -> Outcome:
    """kill -9 of random ranks at random steps, until the run has been killed `count` times; the digests must agree."""
    shards = tiny_shards(work / "data")
    interval = 64
    images = interval * (count + 4)
    config = write_config(
        work / "tiny.yaml", tiny_config(shards), total_images=images, checkpoint_interval_images=interval
    )
    left_alone, killed = work / "left_alone", work / "killed"
    assert finish(sret_scale("train", config, "--run", left_alone, cwd=work)) == 0
    for kill in range(count):
        after = metrics_bytes(killed)
        process = sret_scale("train", config, "--run", killed, cwd=work)
        wait_for_images(killed, interval * kill + 32 * chance.randrange(1, 4), process, after=after)
        time.sleep(chance.random() * 0.1)
        kill_a_rank(process, chance)
    assert finish(sret_scale("train", config, "--run", killed, cwd=work)) == 0
    same = digest(killed) == digest(left_alone)
    return Outcome(fault="kill -9 of a random rank at a random step", num_tried=count, num_survived=count * same)


def kill_a_rank(process: Process, chance: random.Random) -> None:
    """kill -9 of one of the ranks of a start, which must fail of it."""
    victims = rank_processes(process)
    assert len(victims) == 2, f"expected two ranks, found {victims}"
    chance.choice(victims).kill()
    assert finish(process) not in (0, 85)


def finish(process: Process) -> int:
    """The exit status; its output is read, so that a full pipe cannot stop it."""
    process.communicate(timeout=600)
    return process.returncode


def empty(files: Iterable[Path]) -> None:
    for file in files:
        os.truncate(file, 0)


def single_faults(work: Path) -> Outcome:
    """One run, hit by a fault of another kind in each start; the same command always goes on, to the same digest."""
    shards = tiny_shards(work / "single")
    config = write_config(work / "single.yaml", tiny_config(shards), total_images=960, hang_timeout_s=20.0)
    left_alone, run = work / "single_left_alone", work / "single_run"
    assert finish(sret_scale("train", config, "--run", left_alone, cwd=work)) == 0
    faults: list[tuple[Callable[[Process, list[psutil.Process]], object], tuple[int, ...]]] = [
        (lambda start, _ranks: start.send_signal(signal.SIGTERM), (85,)),
        (lambda _start, ranks: ranks[1].send_signal(signal.SIGUSR1), (85,)),
        (lambda _start, ranks: ranks[1].suspend(), (3,)),
        (lambda _start, ranks: ranks[1].rlimit(psutil.RLIMIT_AS, (ranks[1].memory_info().vms,) * 2), (1, 2)),
        (lambda _start, _ranks: empty(tars), (1, 2)),
    ]
    tars = {tar: tar.read_bytes() for tar in (shards / "train").glob("*.tar")}
    survived = 0
    for number, (fault, statuses) in enumerate(faults):
        after = metrics_bytes(run)
        process = sret_scale("train", config, "--run", run, cwd=work)
        wait_for_images(run, 160 * number + 32, process, after=after)
        ranks = sorted(rank_processes(process), key=lambda rank: rank.environ()["RANK"])
        fault(process, ranks)
        _, error = process.communicate(timeout=600)
        survived += process.returncode in statuses and (process.returncode == 85 or "error: " in error)
        for tar, content in tars.items():
            tar.write_bytes(content)
    assert finish(sret_scale("train", config, "--run", run, cwd=work)) == 0
    return Outcome(
        fault="SIGTERM, SIGUSR1, SIGSTOP, no memory, no data",
        num_tried=len(faults),
        num_survived=survived * (digest(run) == digest(left_alone)),
    )


def other_world_sizes(work: Path) -> Outcome:
    """2 -> 1 -> 4 -> 2 ranks in the middle of epochs: every start continues where the last one stopped."""
    shards = tiny_shards(work / "worlds")
    config = write_config(work / "worlds.yaml", tiny_config(shards), total_images=512, checkpoint_interval_images=0)
    run, survived = work / "worlds_run", 0
    for number, ranks in enumerate((2, 1, 4, 2)):
        after = metrics_bytes(run)
        process = sret_scale("train", config, "--run", run, "--ranks", str(ranks), cwd=work)
        if number < 3:
            wait_for_images(run, 96 * (number + 1), process, after=after)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
        survived += process.returncode == (85 if number < 3 else 0)
    images = [line["images"] for line in complete_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    assert images == list(range(32, 513, 32)), images
    return Outcome(fault="another number of ranks (2, 1, 4, 2)", num_tried=4, num_survived=survived)


def chaos(work: Path, chance: random.Random, seconds: float) -> Outcome:
    """Kills 8 to 16 s after the first step of a start: each must come further, the weights be those of one left alone.

    The useful time is that of the steps which were kept; below MIN_USEFUL_RATIO nothing counts as survived.
    """
    shards = tiny_shards(work / "chaos")
    config = write_config(
        work / "chaos.yaml",
        tiny_config(shards),
        total_images=10**7,
        checkpoint_interval_images=160,
        keep_checkpoints=10**6,
    )
    run, started, reached = work / "chaos_run", time.monotonic(), [0]
    while time.monotonic() - started < seconds:
        process, after = sret_scale("train", config, "--run", run, cwd=work), metrics_bytes(run)
        wait_for_images(run, reached[-1] + 32, process, after=after)
        # From the first step on, because a busy machine may need as long for a start as an idle one for the steps.
        time.sleep(8 + 8 * chance.random())
        kill_a_rank(process, chance)
        checkpoints = list_checkpoints(run / "checkpoints")
        reached.append(read_state(checkpoints[0])["images"] if checkpoints else 0)
    spent_s = time.monotonic() - started
    newest = list_checkpoints(run / "checkpoints")[0]
    useful = read_state(newest)["time_s"] / spent_s
    progressed = sum(before < after for before, after in itertools.pairwise(reached))
    is_good = useful >= MIN_USEFUL_RATIO and digest_of(newest) == left_alone_until(newest.name, config, work)
    return Outcome(
        fault="chaos: a kill 8 to 16 s after the first step",
        num_tried=len(reached) - 1,
        num_survived=progressed * is_good,
        note=f"{useful:.0%} of {spent_s:.0f} s useful",
    )


def left_alone_until(name: str, config: Path, work: Path) -> dict[str, str]:
    """The digest of the checkpoint `name` of a run that nothing interrupts before."""
    run = work / "chaos_left_alone"
    process = sret_scale("train", config, "--run", run, cwd=work)
    while not (run / "checkpoints" / name).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 85
    return digest_of(run / "checkpoints" / name)


def suite(work: Path, chance: random.Random, size: Size, part: str) -> Iterator[Callable[[], Outcome]]:
    """The faults in turn."""
    if part != "runs":
        yield lambda: crashes_while_saving(work, chance, size.crash_points, "signal=KILL")
        for error in ("EIO", "ENOSPC", "EROFS"):
            yield lambda error=error: crashes_while_saving(work, chance, size.crash_points, f"error={error}")  # type: ignore[misc]
        yield lambda: mutations(work, chance, size.num_mutations)
    if part != "saves" and size.num_kills:
        yield lambda: kills(work, chance, size.num_kills)
        yield lambda: single_faults(work)
        yield lambda: other_world_sizes(work)
        yield lambda: chaos(work, chance, size.chaos_s)


def main() -> int:
    """Print the table; 1 when a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for name in ("reduced", "short"):
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=str(SIZES[name]))
    parser.add_argument("--part", choices=("all", "saves", "runs"), default="all", help="saves needs strace")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(size="full")
    args = parser.parse_args()
    chance, has_failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as work:
        for fault in suite(Path(work), chance, SIZES[args.size], args.part):
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
