"""What regional compilation costs and gives: `python -m benchmarks.compile`.

The same widths, groups and projections at 20 and at 1000 applications, each in a process of its own with an empty
compiler cache: graphs, the first step's time without that of a steady step, and a steady step beside an eager one.
Times are processor times of the process and of the C++ compilers that it starts, so that other work on the machine
matters little. Nothing here needs a GPU.
"""

import argparse
import copy
import json
import os
import platform
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
from torch._dynamo.utils import counters

from sret_scale.model import Noise, SReT, SReTConfig, preset
from sret_scale.model.regional import compile_blocks

# Applications -> loops of the three stages, whose blocks are 2-5-3.
LOOPS = {20: (2, 2, 2), 1000: (115, 130, 40)}


def config_of(loops: tuple[int, ...], conditioning: str, image_size: int) -> SReTConfig:
    """SReT-T with these loops. The scheme and skips of deep models for all, so that all run the same program."""
    config = preset("sret_t_1000", image_size=image_size, drop_path=0.0)
    fields: dict[str, Any] = {"branch_scheme": "loop_aware", "skip": "frozen", "conditioning": conditioning}
    stages = tuple(replace(stage, num_loops=count, **fields) for stage, count in zip(config.stages, loops, strict=True))
    return replace(config, stages=stages)


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


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

    seconds(eager)  # what only the process's first step pays is no cost of compiling
    reason = compile_blocks(compiled, backend=backend)
    if reason is not None:
        raise RuntimeError(reason)
    counters.clear()
    first_step_s = seconds(compiled)
    graphs = counters["stats"]["unique_graphs"]
    pairs = [(seconds(compiled), seconds(eager)) for _ in range(repeats)]
    compiled_s, eager_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "applications": sum(stage.num_blocks * stage.num_loops for stage in config.stages),
        "graphs": graphs,
        "graphs_of_later_steps": counters["stats"]["unique_graphs"] - graphs,
        "first_step_s": first_step_s,
        "compile_s": first_step_s - compiled_s,
        "steady_compiled_s": compiled_s,
        "steady_eager_s": eager_s,
        "speedup": eager_s / compiled_s,
    }


def in_own_process(applications: int, args: argparse.Namespace) -> dict[str, Any]:
    """`first_and_steady` with an empty compiler cache and one compiling thread, which `processor_s` counts."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.compile", "--one", str(applications)]
        for name in ("batch", "repeats", "image_size", "conditioning", "threads"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--conditioning", default="none")
    parser.add_argument("--repeats", type=int, default=5)
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
    rows = []
    for applications in LOOPS:
        row = in_own_process(applications, args)
        rows.append(row)
        print(
            f"{applications:>5} applications: {row['graphs']} graphs, {row['graphs_of_later_steps']} in later steps; "
            f"compiling {row['compile_s']:.1f} s; step {row['steady_compiled_s']:.3f} s, eager "
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
