"""What distillation costs, live and stored: `python -m benchmarks.distill`.

Five questions: what a stored view weighs, what reading labels adds to a step, how a step with stored labels compares
with one without a teacher and with live teachers, how near writing comes to the teacher's raw speed, and what is kept
at which K. What is compared takes turns within one process; medians are reported, and ratios are medians of the ratios
within a turn. Times are of the wall and of the processor: on a busy machine the second ones say more.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.atomic_files import replacing
from data_pipelines.config import DataConfig
from data_pipelines.image.view import draw_view, training_pixels
from data_pipelines.labels.records import coverage_sums, encode_records, record_dtype, render_file
from data_pipelines.labels.store import HEADER_NAME, LabelPlan, open_labels, render_header
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.prefetch import Batch
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.distill import StoredTeacher, build_teacher, soft_loss
from sret_scale.distill.label_writer import LabelJob, plan_labels, save_plan, write_labels
from sret_scale.model import Noise, SReT, describe, preset
from sret_scale.runs.run_folder import machine

CPU = torch.device("cpu")
KEPT = (1, 3, 5, 10, 20, 50, 100, 200, 500)
# About ten times the multiply-adds of SReT-T at 224 pixels; random weights cost the same time.
LARGE_TEACHER = "resnet152"


def times_s(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds {"wall": {name: [...]}, "processor": {...}} of calls that take turns, after an unmeasured one of each."""
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in clocks}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            starts = {clock: now() for clock, now in clocks.items()}
            call()
            for clock, now in clocks.items():
                times[clock][name].append(now() - starts[clock])
    return times


def medians(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The median of each call's seconds."""
    return {clock: {name: statistics.median(s) for name, s in calls.items()} for clock, calls in times.items()}


def ratios(times: dict[str, dict[str, list[float]]], above: str, below: str) -> dict[str, float]:
    """The median of `above` / `below` within a turn."""
    return {
        clock: statistics.median(a / b for a, b in zip(calls[above], calls[below], strict=True))
        for clock, calls in times.items()
    }


def synthetic_store(folder: Path, *, num_shards: int, shard_samples: int, top_k: int) -> StoredTeacher:
    """A store like ImageNet's: 1000 classes, one view, shards of a thousand, random answers."""
    plan = LabelPlan(
        fingerprint="0" * 64,
        shards=[(f"shard-{number:06d}.tar", shard_samples) for number in range(num_shards)],
        num_classes=1000,
        top_k=top_k,
        num_views=1,
        views_per_file=1,
        batch_size=1,
        image_size=224,
        teacher={
            "spec": "none",
            "weights_sha256": "0" * 64,
            "image_size": 224,
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "precision": "fp32",
        },
        view={},
    )
    folder.mkdir()
    save_plan(folder, plan)
    log_probs = (3 * torch.randn(shard_samples, 1000, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    records = encode_records(log_probs, np.tile(np.array([[1, 2, 300, 200, 1]]), (shard_samples, 1)), top_k)
    for unit in plan.units():
        data = render_file({"plan_sha256": plan.sha256, "shard": unit.shard}, records[None])
        (folder / plan.file_name(unit)).write_bytes(data)
    with replacing(folder / HEADER_NAME) as file:
        file.write(render_header(plan, {"mass": 0.0}))
    return StoredTeacher(open_labels(folder))


def random_batch(store: StoredTeacher, batch: int, seed: int) -> Batch:
    """Rows whose views are those of the synthetic store."""
    total = sum(count for _, count in store.store.plan.shards)
    rows = np.random.default_rng(seed).integers(0, total, batch)
    return Batch(
        images=torch.zeros(batch, 3, 1, 1, dtype=torch.uint8),
        labels=torch.zeros(batch, dtype=torch.int64),
        indices=torch.from_numpy(rows),
        valid=torch.ones(batch, dtype=torch.bool),
        views=torch.tensor([[1, 2, 300, 200, 1]], dtype=torch.int32).repeat(batch, 1),
        view_numbers=torch.zeros(batch, dtype=torch.int32),
    )


def reading(folder: Path) -> dict[str, Any]:
    """Bytes of a view on disk, and the time to look up labels, at K = 10."""
    store = synthetic_store(folder, num_shards=64, shard_samples=1000, top_k=10)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    batches = iter([random_batch(store, 256, seed) for seed in range(300)] * 100)
    first = time.perf_counter()
    store.probabilities(next(batches))
    first = time.perf_counter() - first
    median = medians(times_s({"read": lambda: store.probabilities(next(batches))}, 200))["wall"]["read"]
    return {
        "bytes_per_view": num_bytes / 64_000,
        "first_batch_s": first,
        "batch_256_s": median,
        "labels_per_s": 256 / median,
    }


def steps(folder: Path, *, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a training step of SReT-T at 224 pixels: no teacher, stored labels, live teachers."""
    torch.manual_seed(0)
    student = SReT(preset("sret_t")).train()
    unit_BCHW, target_B = torch.rand(batch, 3, 224, 224), torch.arange(batch)
    stored = StoredTeacher(open_labels(folder))
    rows = random_batch(stored, batch, 0)
    teachers = {
        "efficientnet-lite2": build_teacher("efficientnet-lite2", num_classes=1000, device=CPU, load_run=no_runs),
        LARGE_TEACHER: build_teacher(
            f"module:{__name__}:large_teacher", num_classes=1000, device=CPU, load_run=no_runs
        ),
    }

    def step(answers: Callable[[], Tensor] | None) -> None:
        student.zero_grad(set_to_none=True)
        log_probs_BC = answers() if answers else None
        logits_BC = student(unit_BCHW, Noise(0, 0))
        loss = F.cross_entropy(logits_BC, target_B) if log_probs_BC is None else soft_loss(logits_BC, log_probs_BC)
        torch.autograd.backward(loss)

    calls: dict[str, Callable[[], object]] = {
        "none": lambda: step(None),
        "stored": lambda: step(lambda: stored.probabilities(rows).log()),
    }
    for name, teacher in teachers.items():
        calls[name] = lambda teacher=teacher: step(lambda: teacher(unit_BCHW))  # type: ignore[misc]
    times = times_s(calls, repeats)
    return {
        "batch": batch,
        "seconds": medians(times),
        "stored_over_none": ratios(times, "stored", "none"),
        "live_over_stored": {name: ratios(times, name, "stored") for name in teachers},
        "student_macs": describe(student.config)["macs"],
        "teacher_macs": {name: macs(teacher) for name, teacher in teachers.items()},
    }


def macs(teacher: Any) -> int:
    """Multiply-adds of one image at the teacher's own size."""
    size = teacher.network.image_size
    with FlopCounterMode(display=False) as counter:
        teacher(torch.rand(1, 3, size, size))
    return counter.get_total_flops() // 2


def large_teacher() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """An untrained network of about ten times the student's multiply-adds."""
    from sret_scale.timm import import_timm

    model: nn.Module = import_timm().create_model(LARGE_TEACHER)
    return model, (0.5,) * 3, (0.5,) * 3, 224


def no_runs(folder: Path) -> Any:
    raise AssertionError(folder)


def photographs() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """RGB photographs of scikit-image and scikit-learn."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [*(getattr(skimage.data, name)() for name in names), *load_sample_images().images]


def photo_shards(folder: Path, copies: int) -> ShardSet:
    """The photographs as JPEG files, several times over, in shards."""
    from PIL import Image

    for number in range(copies):
        for place, pixels in enumerate(photographs()):
            path = folder / "images" / f"class{place}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)
    write_shards(
        WriteConfig(kind="folder", source=folder / "images", shard_samples=32), folder / "shards", num_workers=1
    )
    return open_shards(folder / "shards")


def writing(folder: Path, *, copies: int, repeats: int) -> dict[str, Any]:
    """Images/s of writing a store against those of its teacher alone on as many ready images, in turns."""
    shards = photo_shards(folder, copies)
    # The photographs have six classes here and a thousand for the teacher: its first six do for a speed.
    teacher = build_teacher(f"module:{__name__}:six_classes", num_classes=6, device=CPU, load_run=no_runs)
    plan = plan_labels(
        shards,
        teacher,
        data=DataConfig(view_seed=0),
        image_size=224,
        top_k=5,
        num_views=1,
        views_per_file=1,
        batch_size=16,
    )
    job = LabelJob(
        folder=folder / "store",
        plan=plan,
        shards=shards,
        data=DataConfig(view_seed=0, workers=1),
        teacher=teacher,
        device=CPU,
    )
    counts = [count for _, total in plan.shards for count in np.diff([*range(0, total, 16), total])]
    ready = [torch.rand(count, 3, 224, 224) for count in counts]

    def write() -> None:
        shutil.rmtree(job.folder, ignore_errors=True)
        assert write_labels(job, rank=0, world_size=1, report=lambda text: None)

    times = times_s({"raw": lambda: [teacher(unit_BCHW) for unit_BCHW in ready], "write": write}, repeats)
    seconds = medians(times)
    return {
        "images": shards.num_samples,
        "raw_images_per_s": shards.num_samples / seconds["wall"]["raw"],
        "written_images_per_s": shards.num_samples / seconds["wall"]["write"],
        "written_over_raw": ratios(times, "raw", "write"),
    }


def six_classes() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """EfficientNet-Lite0 that answers about its first six classes."""
    from sret_scale.distill import efficientnet_lite

    network, size = efficientnet_lite.load_efficientnet_lite("efficientnet-lite0")

    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return self.network(x_BCHW)[:, :6]

    return Six(), efficientnet_lite.MEAN, efficientnet_lite.STD, size


def kept_mass(num_views: int) -> list[dict[str, float]]:
    """Mass, divergence and bytes for each K, of EfficientNet-Lite0 on random crops of the photographs."""
    teacher = build_teacher("efficientnet-lite0", num_classes=1000, device=CPU, load_run=no_runs)
    config = DataConfig()
    log_probs = []
    for place, pixels in enumerate(photographs()):
        image_CHW = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        views = [draw_view(config, *image_CHW.shape[1:], seed=0, number=n, index=place) for n in range(num_views)]
        crops = torch.stack([training_pixels(image_CHW, view, config, 224) for view in views])
        log_probs.append(F.log_softmax(teacher(crops.float() / 255), dim=-1))
    all_log_probs = torch.cat(log_probs)
    views_B5 = np.zeros((len(all_log_probs), 5), np.int64)
    rows = []
    for top_k in KEPT:
        records = encode_records(all_log_probs, views_B5, top_k)
        sums = coverage_sums(all_log_probs, records, torch.zeros(len(records), dtype=torch.int64))
        means = {name: sums[name] / sums["views"] for name in ("mass", "kl", "entropy", "gradient_cosine")}
        rows.append({"top_k": top_k, "bytes_per_view": record_dtype(top_k).itemsize, **means})
    return rows


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Mass kept and bytes of a view over K."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, style, label in (("mass", "o-", "probability kept"), ("gradient_cosine", "^:", "cosine of the gradient")):
        axis.plot([row["top_k"] for row in rows], [row[name] for row in rows], style, color="tab:blue", label=label)
    axis.set(xscale="log", xlabel="classes kept, K", ylabel="probability kept, cosine of the gradient", ylim=(0, 1.05))
    other = axis.twinx()
    num_bytes = [row["bytes_per_view"] for row in rows]
    other.plot([row["top_k"] for row in rows], num_bytes, "s--", color="tab:orange", label="bytes a view")
    other.set(yscale="log", ylabel="bytes a view")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path)


def main() -> None:
    """Print the figures and write them as JSON, with the plot beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="of the training steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=16, help="of the six photographs, for the speed of writing")
    parser.add_argument("--views", type=int, default=40, help="of each photograph, for the mass kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distill.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures: dict[str, Any] = {
            "machine": {**machine(), "threads": args.threads, "load_at_start": os.getloadavg()[0]},
            "versions": {name: version(name) for name in ("torch", "timm", "torchvision", "numpy")},
            "command": shlex.join(["python", "-m", "benchmarks.distill", *sys.argv[1:]]),
            "reading": reading(folder / "imagenet"),
            "steps": steps(folder / "imagenet", batch=args.batch, repeats=args.repeats),
            "writing": writing(folder / "photos", copies=args.copies, repeats=args.repeats),
            "kept": kept_mass(args.views),
        }
    # The aim is at most 0.02.
    figures["reading"]["share_of_step"] = (
        figures["reading"]["batch_256_s"] / 256 * args.batch / figures["steps"]["seconds"]["wall"]["none"]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    plot(figures["kept"], args.out.with_suffix(".svg"))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
