"""The engine's cost: our training step against a bare DDP loop, bytes sent per ZeRO stage, and what a checkpoint takes.

    python -m benchmarks.engine --image-size 224 128 --micro-batch 16 --rounds 8 --out benchmarks/results/engine.json

Two gloo ranks of one thread each train SReT-T (4.8M parameters) from the same shards: by sret_scale.train.loop's own
step (checks, gradient norm, moving average, agreement between ranks) and by the shortest loop that PyTorch's
DistributedDataParallel allows. They take turns, so that other work on the machine meets all alike: compare ratios, and
on a busy machine those of processor time. Bytes are read from the kernel's counters of this process' own sockets.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.tiny_run import tiny_config, tiny_shards
from data_pipelines.image.augment import BatchAugment
from data_pipelines.image.normalise import Normaliser
from data_pipelines.stream.loader import LoaderState, Step
from sret_scale.config.run_config import EngineConfig, RunConfig
from sret_scale.distill import student_batch
from sret_scale.memory import MemoryConfig
from sret_scale.model import Noise, preset
from sret_scale.runs.checkpoint import list_checkpoints
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.assemble import Clock, Run, set_up
from sret_scale.train.distributed import Ranks, barrier, leave, ranks_from_environment
from sret_scale.train.engine.engine import start_communication
from sret_scale.train.journal import log, log_telemetry
from sret_scale.train.resume import restore, save
from sret_scale.train.step import optimizer_step

STAGES = ("zero0", "zero1", "zero2", "zero3")
WORLD_SIZE = 2
TCP_BYTES_SENT = 200
"""Offset of tcpi_bytes_sent in struct tcp_info (linux/tcp.h), a u64."""


@dataclass(kw_only=True)
class Series:
    """What one kind of loop took, step by step, on this rank."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """One step; ranks begin together."""
        barrier()
        wall_s, cpu_s, sent_bytes = time.perf_counter(), processor_s(), bytes_sent()
        yield
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(processor_s() - cpu_s)
        self.sent_bytes.append(bytes_sent() - sent_bytes)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in vars(self).items()}


def processor_s() -> float:
    """Of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def bytes_sent() -> int:
    """What this process has sent over all its open TCP connections, by the kernel's count."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        if not (entry.is_symlink() and str(entry.readlink()).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if connection.family == socket.AF_INET and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, TCP_BYTES_SENT)[0]
    return total


def run_config(shards: Path, stage: str, image_size: int, micro_batch: int) -> RunConfig:
    config = tiny_config(shards)
    return replace(
        config,
        model=replace(preset("sret_t"), image_size=image_size),
        memory=MemoryConfig(schedule="none"),
        engine=EngineConfig(ds_config=stage),
        train=replace(
            config.train,
            global_batch_size=micro_batch * WORLD_SIZE,
            micro_batch_size=micro_batch,
            total_images=10**6,
        ),
    )


def our_step(run: Run, steps: Iterator[Step], clock: list[Clock]) -> None:
    """What sret_scale.train.loop does in a step, a line of metrics in each included."""
    before = clock[-1]
    with run.phase("waiting for data", before):
        step = next(steps)
    result = optimizer_step(run, step, before, must_stop=lambda: False)
    log_telemetry(run, before)
    samples = before.samples + run.loader.global_batch_size
    clock.append(replace(before, step=before.step + 1, samples=samples, loader=step.next_state))
    log(run, clock[-1], "train", {**result.numbers})


def bare_loop(run: Run, ranks: Ranks) -> Callable[[], None]:
    """One step of the least that trains the same model from the same batches: no norm kept, no average, no checks."""
    torch.manual_seed(run.config.train.seed)
    model = run.config.model.build()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.config.optim.learning_rate)
    augment = BatchAugment(run.config.augment, run.config.model.num_classes)
    normalise = Normaliser(run.config.train.image_mean, run.config.train.image_std)
    steps = run.loader.steps(LoaderState())
    count = 0

    def step() -> None:
        nonlocal count
        (batch,) = next(steps).micro_batches
        images, target, _ = student_batch(
            batch, augment, None, seed=count, device=ranks.device, teacher_input=run.config.distill.teacher_input
        )
        noise = Noise(permutation_seed=count, sample_seed=2 * count + ranks.rank)
        logits = parallel(normalise(images), noise)
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        count += 1

    return step


def compare_steps(runs: dict[str, Run], ranks: Ranks, rounds: int, warm_up: int) -> dict[str, dict[str, float]]:
    """Medians of every kind of loop on this rank, taken in turns."""
    loops: dict[str, Callable[[], None]] = {"ddp": bare_loop(next(iter(runs.values())), ranks)}
    for stage, run in runs.items():
        steps, clock = run.loader.steps(LoaderState()), [Clock()]
        loops[stage] = lambda run=run, steps=steps, clock=clock: our_step(run, steps, clock)  # type: ignore[misc]
    series = {name: Series() for name in loops}
    for number in range(warm_up + rounds):
        for name, loop in loops.items():
            with (series[name] if number >= warm_up else Series()).measured():
                loop()
    return {name: value.medians() for name, value in series.items()}


def checkpoint_cost(run: Run, repeats: int) -> dict[str, Any]:
    """Seconds that a save holds up the loop, until it is committed, and for a restore; bytes on the disk."""
    clock = Clock(step=1, samples=run.loader.global_batch_size)
    pauses_s, pauses_cpu_s, commits_s, restores_s = [], [], [], []
    for number in range(repeats):
        barrier()
        started, started_cpu_s = time.perf_counter(), time.thread_time()
        save(run, replace(clock, step=number + 1))
        pauses_s.append(time.perf_counter() - started)
        pauses_cpu_s.append(time.thread_time() - started_cpu_s)
        run.writer.wait()
        commits_s.append(time.perf_counter() - started)
    for _ in range(repeats):
        barrier()
        started = time.perf_counter()
        restore(run)
        restores_s.append(time.perf_counter() - started)
    newest = list_checkpoints(run.folder.checkpoints)[0]
    return {
        "first_pause_s": pauses_s[0],
        "pause_s": statistics.median(pauses_s[1:]),
        "first_pause_cpu_s": pauses_cpu_s[0],
        "pause_cpu_s": statistics.median(pauses_cpu_s[1:]),
        "until_committed_s": statistics.median(commits_s),
        "restore_s": statistics.median(restores_s),
        "bytes": sum(file.stat().st_size for file in newest.iterdir()),
    }


def one_rank(work: Path, out: Path, args: argparse.Namespace) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    result: dict[str, Any] = {"steps": {}, "parameters": {}}
    for number, image_size in enumerate(args.image_size):
        with contextlib.ExitStack() as stack:
            runs = {}
            for stage in STAGES:
                folder = RunFolder(work / f"{image_size}-{stage}")
                folder.path.mkdir(exist_ok=True)
                runs[stage] = set_up(run_config(work, stage, image_size, args.micro_batch), folder, ranks, stack)
            result["steps"][str(image_size)] = compare_steps(runs, ranks, args.rounds, args.warm_up)
            # The position tensor grows with the image.
            model = runs["zero1"].config.model.build()
            result["parameters"][str(image_size)] = sum(value.numel() for value in model.parameters())
            if number == 0:
                result["checkpoint"] = {stage: checkpoint_cost(run, args.saves) for stage, run in runs.items()}
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(result))
    leave()


def both_ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        work = Path(name)
        tiny_shards(work)
        free.bind(("127.0.0.1", 0))
        shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(free.getsockname()[1])
        free.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:], "--rank-of", name],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(WORLD_SIZE)
        ]
        statuses = [rank.wait() for rank in ranks]
        if any(statuses):
            raise SystemExit(f"a rank failed: {statuses}")
        return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def steps_of_all(ranks: list[dict[str, Any]], image_size: int) -> dict[str, dict[str, float]]:
    """For each kind of loop: the slower rank's time, all ranks' processor time and bytes, ratios to the bare loop."""
    found = [rank["steps"][str(image_size)] for rank in ranks]
    steps = {
        name: {
            "wall_s": max(rank[name]["wall_s"] for rank in found),
            "cpu_s": sum(rank[name]["cpu_s"] for rank in found),
            "sent_bytes_per_rank": sum(rank[name]["sent_bytes"] for rank in found) / len(ranks),
        }
        for name in found[0]
    }
    for values in steps.values():
        values["wall_over_ddp"] = values["wall_s"] / steps["ddp"]["wall_s"]
        values["cpu_over_ddp"] = values["cpu_s"] / steps["ddp"]["cpu_s"]
        values["sent_bytes_per_parameter"] = values["sent_bytes_per_rank"] / ranks[0]["parameters"][str(image_size)]
    return steps


def report(ranks: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What goes into the file: steps and pauses at the first image size, steps alone at the others."""
    main_size, *other_sizes = args.image_size
    saves = ranks[0]["checkpoint"]
    for stage, values in saves.items():
        # The thread that pauses waits for nobody, so its processor time is what an idle machine would take.
        for name in ("pause", "first_pause"):
            values[f"{name}_over_step"] = max(
                rank["checkpoint"][stage][f"{name}_cpu_s"] / rank["steps"][str(main_size)][stage]["cpu_s"]
                for rank in ranks
            )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {WORLD_SIZE} ranks of one thread, gloo on loopback",
        "load": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "command": "python -m benchmarks.engine " + " ".join(sys.argv[1:]),
        "parameters": ranks[0]["parameters"][str(main_size)],
        "image_size": main_size,
        "micro_batch": args.micro_batch,
        "rounds": args.rounds,
        "steps": steps_of_all(ranks, main_size),
        "other_image_sizes": {str(size): steps_of_all(ranks, size) for size in other_sizes},
        "checkpoint": saves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[128], help="the first one's steps are compared with pauses too"
    )
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each loop that count")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank_of:
        one_rank(args.rank_of, args.rank_of, args)
        return
    result = report(both_ranks(args), args)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
