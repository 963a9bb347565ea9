"""A run folder and a store of soft labels made without training: complete, as commands read them, in a second."""

import json
from pathlib import Path

import torch
from torch import nn

from data_pipelines.shards.index import open_shards
from sret_scale.config.run_config import RunConfig, to_plain
from sret_scale.distill import build_teacher
from sret_scale.distill.label_writer import LabelJob, plan_labels, write_labels
from sret_scale.launch.preflight import write_description
from sret_scale.runs.checkpoint import save_checkpoint
from sret_scale.runs.run_folder import RunFolder
from sret_scale.train.load_run import facts_of

Teacher = tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]


def small_teacher() -> Teacher:
    """Ten classes, at 12 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(100, 10)), (0.5,) * 3, (0.5,) * 3, 12


def make_run(path: Path, config: RunConfig) -> Path:
    """A finished run of untrained weights after one step, with a checkpoint, its average and two metric lines."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    write_description(folder, config, world_size=1)
    folder.record_nodes([{"host": "here"}])
    folder.write_status("finished", 0)
    torch.manual_seed(0)
    weights = config.model.build().state_dict()
    clock = {"images": 32, "time_s": 1.0, "loader": '{"epoch": 0, "position": 32}'}
    state = {**clock, "model": to_plain(config.model), **facts_of(config, None)}
    save_checkpoint(folder.checkpoints, step=1, tensors={"weights": weights, "ema": weights}, state=state)
    clock = {"step": 1, "images": 32, "epoch": 0, "time_s": 1.0}
    lines = [
        {"kind": "train", **clock, "loss": 2.3, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 32.0},
        {"kind": "eval", **clock, "split": "test", "weights": "ema", "top1": 0.1, "top5": 0.5, "loss": 2.3},
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_labels(folder: Path, shards: Path, config: RunConfig) -> Path:
    """A finished store of one view of every image, from `small_teacher`."""
    opened, device = open_shards(shards), torch.device("cpu")
    spec = f"module:{__name__}:small_teacher"
    teacher = build_teacher(spec, num_classes=10, device=device, load_run=lambda path: small_teacher())
    numbers = {"image_size": 28, "top_k": 3, "num_views": 1, "views_per_file": 1, "batch_size": 64}
    plan = plan_labels(opened, teacher, data=config.data, **numbers)
    job = LabelJob(folder=folder, plan=plan, shards=opened, data=config.data, teacher=teacher, device=device)
    write_labels(job, rank=0, world_size=1, report=lambda text: None)
    return folder
