"""A small data set with teachers for the tests of stored soft labels."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipelines.config import DataConfig
from sret_scale.distill import build_teacher
from sret_scale.distill.label_writer import LabelJob, plan_labels
from tests.data.stream_shards import TarShards, jpeg, smooth_image

NUM_SAMPLES, NUM_CLASSES = 22, 7
DATA = DataConfig(crop_scale=(0.2, 1.0), view_seed=5, num_views=3, workers=1, last="pad")


def make_shards(folder: Path, *, seed: int = 0) -> Any:
    """22 JPEG images of different shapes in shards of 9, 9 and 4."""
    images = [jpeg(smooth_image(30 + i % 5, 40 - i % 7, seed + i)) for i in range(NUM_SAMPLES)]
    return TarShards(folder, images, [i % NUM_CLASSES for i in range(NUM_SAMPLES)], shard_size=9)


def network(seed: int = 0) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A random classifier at 12 pixels whose answers depend on the image."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, NUM_CLASSES)
    return nn.Sequential(*layers), (0.4, 0.5, 0.6), (0.1, 0.1, 0.1), 12


def other_network() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """The same one with other weights."""
    return network(seed=1)


def teacher(function: str = "network") -> Any:
    """A live teacher on the CPU."""
    spec = f"module:{__name__}:{function}"
    return build_teacher(spec, num_classes=NUM_CLASSES, device="cpu", load_run=lambda folder: network())


def make_job(
    folder: Path, shards: Any, *, data: DataConfig = DATA, function: str = "network", **changes: Any
) -> LabelJob:
    """A store of three views in files of two, all classes kept unless `top_k` says otherwise."""
    live = teacher(function)
    numbers = {"top_k": NUM_CLASSES, "num_views": 3, "views_per_file": 2, "batch_size": 4, "image_size": 16} | changes
    plan = plan_labels(shards, live, data=data, **numbers)
    return LabelJob(folder=folder, plan=plan, shards=shards, data=data, teacher=live, device=torch.device("cpu"))
