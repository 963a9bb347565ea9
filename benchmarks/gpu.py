"""The GPU table of `python -m benchmarks.model --device cuda`: whole training steps of T and S at three depths.

A cell is one model at one micro-batch, padded or as published; it is timed eager, compiled, and compiled and captured
as a CUDA graph, with the plain twin beside it. Cells come in order of interest until the time is up; what was left out
is listed with its reason. Only `captured.capture` and `device_bounds` of a GPU cannot run on a CPU.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.captured import TrainingStep, capture
from benchmarks.plain_sret import PlainSReT
from sret_scale.model import SReT, SReTConfig, StageConfig, describe, preset
from sret_scale.model.compiled_blocks import compile_blocks
from sret_scale.model.stored_sizes import stored_sizes

PRESETS = ("sret_t", "sret_s", "sret_t_108", "sret_s_108", "sret_t_1000", "sret_s_1000")
MICRO_BATCHES = (16, 32, 64, 128, 256, 512)
SMOKE_BATCHES = [2, 4]
MODES = ("eager", "twin", "compiled", "graph")
TIME_LIMIT_S = 440.0
ROUND_S = 0.3
OUT_OF_MEMORY = "out of memory"
# Modes differ by bf16 rounding, which is far below this; a step that skips or repeats something is far above.
LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Cell:
    """One model at one micro-batch."""

    name: str
    config: SReTConfig
    batch: int

    @property
    def key(self) -> dict[str, Any]:
        return {"preset": self.name, "padded": self.config.padded, "micro_batch": self.batch}


def ordered_cells(configs: dict[str, SReTConfig], batches: Sequence[int]) -> list[Cell]:
    """Padded ones and the micro-batches that the aims name first: 256 and 16, at 1000 applications 16 alone fits."""
    wanted = [batch for batch in (256, 16) if batch in batches]
    order = [*wanted, *(batch for batch in batches if batch not in wanted)]
    cells = []
    for padded, batch in itertools.chain(
        ((True, batch) for batch in wanted),
        ((False, batch) for batch in wanted),
        ((padded, batch) for batch in order if batch not in wanted for padded in (True, False)),
    ):
        cells += [Cell(name, replace(config, padded=padded, drop_path=0.0), batch) for name, config in configs.items()]
    return cells


def moved_bytes(config: SReTConfig, batch: int) -> int:
    """A model, not a measurement: bytes that a compiled bf16 training step moves through the device's memory.

    Each product and each fused pointwise kernel reads its inputs and writes its outputs once; the stream is fp32, the
    rest bf16. Per token and application, in widths D and hidden widths F, P: norm and qkv 14 D, attention 8 D, its
    projection and residual 14 D, feed-forward 20 D + 8 F, NLL 20 D + 8 P. The backward pass moves twice as much. A
    weight is cast, read, and its fp32 gradient summed in each use: 20 bytes. Stem, pooling and the gathers of
    permutations are left out.
    """
    total = 0
    for index, stage in enumerate(config.stages):
        sizes = stored_sizes(config, index)
        width, inner = sizes.width, stage.num_heads * sizes.stored_head_width
        hidden = sizes.hidden_width + (sizes.projection_hidden_width if stage.projections != "none" else 0)
        per_token = (76 if stage.projections != "none" else 56) * width + 8 * hidden
        weights = 4 * width * inner + 2 * width * hidden
        tokens = batch * config.grids[index] ** 2
        total += stage.num_applications * (3 * per_token * tokens + 20 * weights)
    return total


def seconds_of(call: Callable[[], object], device: torch.device, *, rounds: int = 3) -> float:
    """Median over rounds of the mean seconds of a call; a round lasts `ROUND_S`, or one call."""
    calls, times = 1, []
    for attempt in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        mean_s = (time.perf_counter() - start) / calls
        if attempt == 0:  # warms up, and tells how many calls a round has
            calls = max(1, int(ROUND_S / mean_s))
        else:
            times.append(mean_s)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_bounds(device: torch.device, size: int) -> dict[str, float]:
    """Peaks measured here: FLOP/s of a square bf16 product, and bytes/s of a copy (read and written) of as much."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    matmul_s = seconds_of(lambda: torch.mm(a, a, out=out), device)
    source = torch.empty(size * size * 4, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source), device)
    return {"bf16_flops_per_s": 2 * size**3 / matmul_s, "copied_bytes_per_s": 2 * source.nbytes / copy_s}


def measured(cell: Cell, mode: str, device: torch.device, backend: str = "inductor") -> dict[str, Any]:
    """What a mode's row says of its speed and memory; the device is as empty afterwards as before."""
    try:
        return _measured(cell, mode, device, backend)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"skipped": OUT_OF_MEMORY}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, which a capture that it broke off or a library may say in an error of another type."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _measured(cell: Cell, mode: str, device: torch.device, backend: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = SReT(cell.config).to(device)
    start, row = time.perf_counter(), {}
    if mode in ("compiled", "graph"):
        torch._dynamo.reset()
        reason = compile_blocks(model, backend=backend)
        if reason is not None:
            return {"skipped": reason}
    step = TrainingStep(model, PlainSReT(model) if mode == "twin" else model, cell.batch, device)
    if mode == "graph":
        captured = capture(step)
        row = {"capture_s": captured.seconds, "pool_bytes": captured.pool_bytes, "graph_bytes": captured.graph_bytes}
    run, numbers = captured.replay if mode == "graph" else step.run, itertools.count()

    def call() -> None:
        step.refill(next(numbers))
        run()

    call()
    synchronize(device)
    row["first_step_s"] = time.perf_counter() - start
    row["step_s"] = seconds_of(call, device)
    step.refill(0)
    run()
    row["loss"] = float(step.loss)
    return row


def with_rates(row: dict[str, Any], cell: Cell, bounds: dict[str, float]) -> dict[str, Any]:
    """The row with images/s and its shares of the measured peaks, if it was timed."""
    if "step_s" not in row:
        return row
    flops = 3 * 2 * describe(cell.config)["macs"] * cell.batch
    bytes_per_s = moved_bytes(cell.config, cell.batch) / row["step_s"]
    return row | {
        "images_per_s": cell.batch / row["step_s"],
        "mfu": flops / row["step_s"] / bounds["bf16_flops_per_s"],
        "moved_bytes_per_s": bytes_per_s,
        "share_of_copy": bytes_per_s / bounds["copied_bytes_per_s"],
    }


class Gate:
    """Decides what is still measured: memory ran out at a smaller batch, or what is left of the time is too short.

    A mode is begun only if it would end in time, were it as long as the longest one so far of its preset, or of any
    preset where its own has none.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit_s, self.clock, self.start = limit_s, clock, clock()
        self.longest_s: dict[str, float] = {}
        self.too_large: dict[tuple[str, bool, str], int] = {}

    def refusal(self, cell: Cell, mode: str) -> str | None:
        """Why the mode is not measured; None if it is."""
        if mode == "twin" and cell.config.padded:
            return "the publication knows no padding"
        too_large = self.too_large.get((cell.name, cell.config.padded, mode))
        if too_large is not None and cell.batch >= too_large:
            return f"memory ran out at micro-batch {too_large}"
        expected_s = self.longest_s.get(cell.name, max(self.longest_s.values(), default=0.0))
        if self.clock() - self.start + expected_s > self.limit_s:
            return f"would pass the time limit of {self.limit_s:.0f} s"
        return None

    def note(self, cell: Cell, mode: str, row: dict[str, Any], seconds: float) -> None:
        """Learns from a mode that was measured."""
        self.longest_s[cell.name] = max(seconds, self.longest_s.get(cell.name, 0.0))
        if row.get("skipped") == OUT_OF_MEMORY:
            key = cell.name, cell.config.padded, mode
            self.too_large[key] = min(cell.batch, self.too_large.get(key, cell.batch))


def table(
    cells: Sequence[Cell], modes: Sequence[str], measure: Callable[[Cell, str], dict[str, Any]], gate: Gate
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every mode of every cell, measured or skipped with its reason.

    RuntimeError where a loss is not that of the same preset and batch in another mode: something else was computed.
    """
    losses: dict[tuple[str, int], float] = {}
    for cell in cells:
        for mode in modes:
            reason = gate.refusal(cell, mode)
            if reason is not None:
                yield cell, cell.key | {"mode": mode, "skipped": reason}
                continue
            start = gate.clock()
            row = cell.key | {"mode": mode} | measure(cell, mode)
            gate.note(cell, mode, row, gate.clock() - start)
            if "loss" in row:
                loss = losses.setdefault((cell.name, cell.batch), row["loss"])
                if not abs(row["loss"] - loss) <= LOSS_TOLERANCE * abs(loss):
                    raise RuntimeError(f"{row} should have the loss {loss} of other modes: it computed something else")
            yield cell, row


def smoke_config() -> SReTConfig:
    """A model that takes a moment on a CPU, with two group counts and permutations."""
    stage = StageConfig(width=12, num_heads=3, num_blocks=1, num_loops=2, groups=(4, 2), mlp_ratio=1.5)
    return SReTConfig(stages=(stage, replace(stage, width=24, groups=(1,))), image_size=16, num_classes=5)


def line_of(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    head = f"{row['preset']:<12} {'padded' if row['padded'] else 'plain':<6} {row['micro_batch']:>4} {row['mode']:<8} "
    if "skipped" in row:
        return head + f"skipped: {row['skipped']}"
    text = head + (
        f"{row['images_per_s']:>9.1f} images/s, MFU {row['mfu']:.2%}, {row['moved_bytes_per_s'] / 1e9:.1f} GB/s "
        f"({row['share_of_copy']:.0%} of a copy)"
    )
    if "capture_s" not in row:
        return text
    return text + (
        f", captured in {row['capture_s']:.1f} s, {row['pool_bytes'] / 2**30:.2f} GiB for tensors, "
        f"{row['graph_bytes'] / 2**30:.2f} GiB besides"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table as it grows and write it as JSON. ValueError where the device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda needs a GPU that torch {torch.__version__} can use, and it finds none; "
            "--device cpu --smoke runs the same code at a tiny size"
        )
    device = torch.device(args.device)
    is_gpu = device.type == "cuda"
    if args.smoke:
        configs, batches = {"smoke": smoke_config()}, SMOKE_BATCHES
    else:
        configs, batches = {name: preset(name) for name in args.presets or PRESETS}, args.micro_batches
    modes = [mode for mode in MODES if is_gpu or mode != "graph"]
    gate = Gate(args.time_limit_s)
    bounds = device_bounds(device, 256 if args.smoke else 8192)
    print(f"peaks: {bounds['bf16_flops_per_s'] / 1e12:.3g} TFLOP/s, {bounds['copied_bytes_per_s'] / 1e9:.0f} GB/s")
    rows = []
    for cell, row in table(
        ordered_cells(configs, batches), modes, lambda cell, mode: measured(cell, mode, device, args.backend), gate
    ):
        rows.append(with_rates(row, cell, bounds))
        print(line_of(rows[-1]), flush=True)
    name = torch.cuda.get_device_name() if is_gpu else "cpu"
    machine = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "bounds": bounds}
    command = f"python -m benchmarks.model {' '.join(sys.argv[1:])}"
    out = args.out
    if out is None and not args.smoke:
        out = Path("benchmarks/results") / f"{name.lower().replace(' ', '_')}.json"
    if out is not None:
        content = {"command": command, "machine": machine, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n")
