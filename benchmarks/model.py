"""Speed and stored activations of the model beside its plain twin: `python -m benchmarks.model`.

All run in one process, alternating, and medians are reported. The twin (`benchmarks/plain_sret.py`) computes as the
publication does; where `SRET_PUBLISHED` names a checkout of the published code, that itself runs too; `--compile` adds
our blocks compiled. Achieved FLOP/s are set against the peak of a matrix product measured in the same run.
`--device cuda` makes the GPU table of `benchmarks.gpu` instead, and `--smoke` runs that table's code at a tiny size.
"""

import argparse
import copy
import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.plain_sret import PlainSReT
from benchmarks.published import published_twin
from sret_scale.model import Noise, SReT, describe, preset
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.operations import matmul as products
from sret_scale.model.vision.for_inference import folded

# Wall time, or processor time of all threads: what to compare on a machine that has other work.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def median_times_s(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that a change of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def stored_bytes(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes of activations that a forward pass keeps for its backward pass; storage counts once, weights do not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive until the end, so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_flops(clock: Callable[[], float], size: int = 2048) -> dict[str, float]:
    """FLOP/s of a square fp32 matrix product: torch's own, and the one that the model uses (`model.products`)."""
    a = torch.randn(size, size)
    out = torch.empty(size, size)
    calls = {"torch.mm": lambda: torch.mm(a, a, out=out), "products.linear": lambda: products.linear(a, a)}
    return {name: 2 * size**3 / seconds for name, seconds in median_times_s(calls, 5, clock).items()}


def compare(
    name: str, batch: int, repeats: int, peak: float, clock: Callable[[], float], *, is_compiled: bool = False
) -> dict[str, Any]:
    """One preset against its twin, and the published code where it is: training step, inference, stored activations."""
    torch.manual_seed(0)
    model = SReT(preset(name))
    twin = PlainSReT(model)
    size = model.config.image_size
    images_BCHW, labels_B = torch.randn(batch, 3, size, size), torch.arange(batch)
    noise = Noise(0, 0)
    others: dict[str, nn.Module] = {"twin": twin}
    if is_compiled:
        compiled = copy.deepcopy(model)
        if reason := compile_blocks(compiled):
            raise ValueError(reason)
        others["compiled"] = compiled
    if published := published_twin(name, model):
        others["published"] = published

    def forward(module: nn.Module) -> Tensor:
        return module(images_BCHW) if module is published else module(images_BCHW, noise)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        F.cross_entropy(forward(module), labels_B).backward()

    @torch.inference_mode()
    def infer(module: nn.Module) -> None:
        module(images_BCHW)

    parameters = list(model.parameters())
    for module in (model, *others.values()):
        module.train()
    train = median_times_s(
        {key: functools.partial(step, module) for key, module in {"model": model, **others}.items()}, repeats, clock
    )
    stored = {
        key: stored_bytes(lambda module=module: module(images_BCHW, noise), parameters)  # type: ignore[misc]
        for key, module in (("model", model), ("twin", twin))
    }
    for module in (model, *others.values()):
        module.eval()
    small = folded(model)
    inference = median_times_s(
        {key: functools.partial(infer, module) for key, module in {"model": small, **others}.items()}, repeats, clock
    )
    flops = 2 * describe(model.config)["macs"] * batch
    return {"preset": name, "batch": batch, **ratios(train, inference, stored, flops, peak)}


def ratios(
    train: dict[str, float], inference: dict[str, float], stored: dict[str, int], flops: float, peak: float
) -> dict[str, Any]:
    """What the seconds of each model, and the bytes that it stores, mean beside one another and beside the peak."""
    return {
        "train_s": train,
        "train_speedup": train["twin"] / train["model"],
        "train_over_published": over_published(train),
        "inference_s": inference,
        "inference_speedup": inference["twin"] / inference["model"],
        "inference_over_published": over_published(inference),
        "stored_bytes": stored,
        "stored_ratio": stored["model"] / stored["twin"],
        "train_flops": 3 * flops / train["model"],
        "inference_flops": flops / inference["model"],
        "train_share_of_peak": 3 * flops / train["model"] / peak,
        "inference_share_of_peak": flops / inference["model"] / peak,
    }


def over_published(times_s: Mapping[str, float]) -> dict[str, float]:
    """How many times as fast as the published code each of ours is; empty where that did not run."""
    ours = [name for name in ("model", "compiled") if name in times_s and "published" in times_s]
    return {name: times_s["published"] / times_s[name] for name in ours}


def processor_name() -> str:
    """The maker's name of the processor, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the GPU table")
    parser.add_argument("--presets", nargs="+", help="default: sret_t and sret_s, on a GPU also at 108 and 1000")
    parser.add_argument("--out", type=Path, help="JSON file; on a GPU by default benchmarks/results/GPU_NAME.json")
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    cpu.add_argument("--repeats", type=int, default=7)
    cpu.add_argument("--compile", action="store_true", help="a row of compiled blocks too")
    cpu.add_argument("--threads", type=int, default=2)
    cpu.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a machine that has other work")
    table = parser.add_argument_group("the GPU table")
    table.add_argument("--micro-batches", type=int, nargs="+", default=gpu.MICRO_BATCHES)
    table.add_argument("--time-limit-s", type=float, default=gpu.TIME_LIMIT_S, help="what does not fit is skipped")
    table.add_argument("--backend", default="inductor", help="of torch.compile")
    table.add_argument("--smoke", action="store_true", help="the table of one tiny model, also on a CPU")
    return parser.parse_args()


def main() -> None:
    """Print a table and write the figures as JSON; exit status 2 where the device is not there."""
    args = parsed_arguments()
    if args.device == "cuda" or args.smoke:
        try:
            gpu.run(args)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        return
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    peaks = peak_flops(clock)
    peak = max(peaks.values())
    products_text = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in peaks.items())
    print(f"peak, GFLOP/s: {products_text}; {args.threads} threads, {args.clock} time, torch {torch.__version__}")
    rows = []
    for name, batch in itertools.product(args.presets or ("sret_t", "sret_s"), args.batch):
        row = compare(name, batch, args.repeats, peak, clock, is_compiled=args.compile)
        rows.append(row)
        print(
            f"{name:<10} batch {batch}: train {row['train_s']['model']:.2f} s, {row['train_speedup']:.2f}x; "
            f"inference {row['inference_s']['model']:.2f} s, {row['inference_speedup']:.2f}x; "
            f"stored {row['stored_bytes']['model'] / 2**20 / batch:.1f} MiB an image, ratio "
            f"{row['stored_ratio']:.2f}; over the published code {row['train_over_published']} / "
            f"{row['inference_over_published']}; of peak {row['train_share_of_peak']:.0%} / "
            f"{row['inference_share_of_peak']:.0%}",
            flush=True,
        )
    if args.out is not None:
        machine = {
            "processor": processor_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "clock": args.clock,
            "torch": torch.__version__,
        }
        command = f"python -m benchmarks.model {' '.join(sys.argv[1:])}"
        content = {"command": command, "machine": machine, "peak_flops": peaks, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
