"""Speed and stored activations of the model beside its plain twin: `python -m benchmarks.model`.

Both run in one process, alternating, and medians are reported. The twin (`tests/reference/sret.py`) computes as the
publication does. Achieved FLOP/s are set against the peak of a matrix product measured in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model import Noise, SReT, describe, preset
from tests.reference.sret import PlainSReT


def median_times_s(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that a change of the machine's speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
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


def peak_flops(size: int = 2048) -> float:
    """FLOP/s of a square fp32 matrix product."""
    a = torch.randn(size, size)
    out = torch.empty(size, size)
    seconds = median_times_s({"product": lambda: torch.mm(a, a, out=out)}, 5)["product"]
    return 2 * size**3 / seconds


def compare(name: str, batch: int, repeats: int, peak: float) -> dict[str, Any]:
    """One preset against its twin: training step, inference, stored activations."""
    torch.manual_seed(0)
    model = SReT(preset(name))
    twin = PlainSReT(model)
    size = model.config.image_size
    images_BCHW, labels_B = torch.randn(batch, 3, size, size), torch.arange(batch)
    noise = Noise(0, 0)

    def step(module: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(module(images_BCHW, noise), labels_B).backward()

    @torch.inference_mode()
    def infer(module: nn.Module) -> None:
        module(images_BCHW)

    parameters = list(model.parameters())
    model.train()
    train = median_times_s({"model": lambda: step(model), "twin": lambda: step(twin)}, repeats)
    stored = {
        key: stored_bytes(lambda module=module: module(images_BCHW, noise), parameters)  # type: ignore[misc]
        for key, module in (("model", model), ("twin", twin))
    }
    model.eval()
    inference = median_times_s({"model": lambda: infer(model), "twin": lambda: infer(twin)}, repeats)
    flops = 2 * describe(model.config)["macs"] * batch
    return {
        "preset": name,
        "batch": batch,
        "train_s": train,
        "train_speedup": train["twin"] / train["model"],
        "inference_s": inference,
        "inference_speedup": inference["twin"] / inference["model"],
        "stored_bytes": stored,
        "stored_ratio": stored["model"] / stored["twin"],
        "train_share_of_peak": 3 * flops / train["model"] / peak,
        "inference_share_of_peak": flops / inference["model"] / peak,
    }


def main() -> None:
    """Print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["sret_t", "sret_s"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = peak_flops()
    print(f"peak {peak / 1e9:.0f} GFLOP/s on {args.threads} threads, torch {torch.__version__}")
    rows = []
    for name in args.presets:
        row = compare(name, args.batch, args.repeats, peak)
        rows.append(row)
        print(
            f"{name:<10} train {row['train_s']['model']:.2f} s, {row['train_speedup']:.2f}x; "
            f"inference {row['inference_s']['model']:.2f} s, {row['inference_speedup']:.2f}x; "
            f"stored {row['stored_bytes']['model'] / 2**20 / args.batch:.1f} MiB an image, ratio "
            f"{row['stored_ratio']:.2f}; of peak {row['train_share_of_peak']:.0%} / "
            f"{row['inference_share_of_peak']:.0%}"
        )
    if args.out is not None:
        machine = {"processor": platform.processor() or platform.machine(), "threads": args.threads}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "peak_flops": peak, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
