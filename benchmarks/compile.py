"""What regional compilation costs and gives: `python -m benchmarks.compile`.

The same widths, groups and projections at 20 and at 1000 applications, each in a process of its own with an empty
compiler cache: graphs, the first step's time without that of a steady step, and a steady step beside an eager one.
Times are processor times of the process and of the C++ compilers that it starts. Both depths run at the same time, so
that a change of the machine's speed meets both alike, and the medians of several rounds are compared. Nothing here
needs a GPU.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters, cumulative_time_spent_ns

from sret_scale.model import Noise, SReT, SReTConfig, preset
from sret_scale.model.compiled_blocks import compile_blocks

# Applications -> loops of the three stages, whose blocks are 2-5-3.
LOOPS = {20: (2, 2, 2), 1000: (115, 130, 40)}


def config_of(loops: tuple[int, ...], conditioning: str, image_size: int) -> SReTConfig:
    """SReT-T with these loops. The scheme and skips of deep models for all, so that all run the same program."""
    config = preset("sret_t_1000", image_size=image_size, drop_path=0.0)
    fields: dict[str, Any] = {"branch_scheme": "loop_aware", "skip": "frozen", "conditioning": conditioning}
    stages = tuple(replace(stage, num_loops=count, **fields) for stage, count in zip(config.stages, loops, strict=True))
    return replace(config, stages=stages)


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended, to the microsecond."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def first_and_steady(config: SReTConfig, batch: int, repeats: int, backend: str | Any = "inductor") -> dict[str, Any]:
    """Seconds of the first compiled step and of steady steps, compiled and eager in turns; numbers of graphs.

    RuntimeError, with the reason, where there is no compiler.
    """
    torch.manual_seed(0)
    eager = SReT(config).train()
    compiled = copy.deepcopy(eager)
    images_BCHW = torch.randn(batch, config.in_channels, config.image_size, config.image_size)
    labels_B = torch.arange(batch) % config.num_classes

    def seconds(model: SReT) -> float:
        start = processor_s()
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images_BCHW, Noise(0, 0)), labels_B).backward()
        return processor_s() - start

    for _ in range(2):
        seconds(eager)  # what only the process's first steps pay (fresh memory) is no cost of compiling
    reason = compile_blocks(compiled, backend=backend)
    if reason is not None:
        raise RuntimeError(reason)
    counters.clear()
    cumulative_time_spent_ns.clear()
    first_step_s = seconds(compiled)
    phases = cumulative_time_spent_ns
    graphs = counters["stats"]["unique_graphs"]
    pairs = [(seconds(compiled), seconds(eager)) for _ in range(repeats)]
    compiled_s, eager_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "applications": sum(stage.num_blocks * stage.num_loops for stage in config.stages),
        "graphs": graphs,
        "graphs_of_later_steps": counters["stats"]["unique_graphs"] - graphs,
        "first_step_s": first_step_s,
        "compile_s": first_step_s - compiled_s,
        # By the compiler's own clock, which is wall time.
        "compiler_wall_s": sum(phases[name] for name in ("entire_frame_compile", "entire_backward_compile")) / 1e9,
        "steady_compiled_s": compiled_s,
        "steady_eager_s": eager_s,
        "speedup": eager_s / compiled_s,
    }


def side_by_side(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`first_and_steady` of both depths at the same time, each with an empty compiler cache and one compiling thread,
    which `processor_s` counts."""
    with contextlib.ExitStack() as stack:
        started = []
        for applications in LOOPS:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.compile", "--one", str(applications)]
            for name in ("batch", "repeats", "image_size", "conditioning", "threads"):
                command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            started.append(stack.enter_context(process))
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("error: a process of the benchmark failed, see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of graphs, which must agree, and median times of the rounds of one depth, with all compile times."""
    row = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    for name in ("applications", "graphs", "graphs_of_later_steps"):
        if len({found[name] for found in rounds}) != 1:
            raise SystemExit(f"error: {name} differs between rounds: {[found[name] for found in rounds]}")
        row[name] = rounds[0][name]
    return {**row, "compile_s_of_rounds": [found["compile_s"] for found in rounds]}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--conditioning", default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of both depths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=int, choices=LOOPS, help="measure this depth in this process, print JSON")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Print a line for each depth and the ratio of their compile times; write the figures as JSON."""
    args = parsed_arguments()
    if args.one is not None:
        torch.set_num_threads(args.threads)
        config = config_of(LOOPS[args.one], args.conditioning, args.image_size)
        print(json.dumps(first_and_steady(config, args.batch, args.repeats)))
        return
    rounds = [side_by_side(args) for _ in range(args.rounds)]
    rows = [medians(list(of_one_depth)) for of_one_depth in zip(*rounds, strict=True)]
    for row in rows:
        print(
            f"{row['applications']:>5} applications: {row['graphs']} graphs, {row['graphs_of_later_steps']} in later "
            f"steps; compiling {row['compile_s']:.1f} s; step {row['steady_compiled_s']:.3f} s, eager "
            f"{row['steady_eager_s']:.3f} s, {row['speedup']:.2f}x",
            flush=True,
        )
    ratio = rows[-1]["compile_s"] / rows[0]["compile_s"]
    print(f"compiling at {rows[-1]['applications']} over {rows[0]['applications']} applications: {ratio:.2f}")
    if args.out is not None:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "clock": "processor, of the process and its compilers",
            "torch": torch.__version__,
        }
        command = f"python -m benchmarks.compile {' '.join(sys.argv[1:])}"
        content = {"command": command, "machine": machine, "rows": rows, "compile_ratio": ratio}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
