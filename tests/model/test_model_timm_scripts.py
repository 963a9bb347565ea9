"""timm's own training and validation, with a model of this project: its functions here, its scripts where they lie.

The scripts are in timm's repository and not in its wheel. SRET_TIMM_SCRIPTS names the folder that holds `train.py` and
`validate.py` (a checkout); without it the slow tests skip.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from sret_scale.timm import import_timm

pytestmark = pytest.mark.multi_process

timm = import_timm()
SCRIPTS = os.environ.get("SRET_TIMM_SCRIPTS")
# A class is a mean brightness, so that a working training cannot fail to find it.
MODELS = {
    "sret": ["--model", "demo_control_20", "--img-size", "28"],
    "recursive": ["--model", "recursive.test_vit", "--img-size", "32", "--model-kwargs", "num_blocks=2", "num_loops=2"],
}
COMMON = ["--num-classes", "2", "--device", "cpu", "-j", "0", "-b", "8"]
TRAINING = [
    *("--opt", "adamw", "--lr", "2e-3", "--layer-decay", "0.9", "--warmup-epochs", "0", "--sched", "cosine"),
    *("--drop-path", "0.1", "--smoothing", "0", "--model-ema", "--model-ema-decay", "0.5", "--grad-checkpointing"),
    *("--no-aug", "--cooldown-epochs", "0", "--log-interval", "1"),
]
PIXELS = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and bright images, 16 of each to train on and 8 to validate with."""
    image = importlib.import_module("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("validation", 8)):
        for name, level in (("dark", 40), ("bright", 215)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image.new("RGB", (28, 28), (level - index, level, level + index)).save(
                    root / split / name / f"{index}.png"
                )
    return root


def run_script(name: str, arguments: list[str], folder: Path) -> str:
    """What a script of timm prints, with the presets registered before it starts."""
    if SCRIPTS is None:
        pytest.skip("SRET_TIMM_SCRIPTS names no folder with timm's train.py and validate.py")
    wrapper = folder / "wrapper.py"
    wrapper.write_text(
        "import runpy, sys, sret_scale.timm\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(wrapper), str(Path(SCRIPTS) / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_scripts_train_resume_and_validate(folder: Path, tmp_path: Path, kind: str) -> None:
    shared = ["--data-dir", str(folder), *MODELS[kind], *COMMON, *PIXELS]
    training = [*shared, *TRAINING, "--output", str(tmp_path)]
    run_script("train.py", [*training, "--experiment", "first", "--epochs", "2"], tmp_path)
    last = str(tmp_path / "first" / "last.pth.tar")
    more = ["--experiment", "second", "--epochs", "4", "--resume", last]
    text = run_script("train.py", [*training, *more], tmp_path)
    assert "Train: 2 [" in text and "Train: 1 [" not in text
    results, best = tmp_path / "results.json", tmp_path / "second" / "model_best.pth.tar"
    evaluate = [*shared, "--checkpoint", str(best), "--use-ema"]
    run_script("validate.py", [*evaluate, "--results-file", str(results), "--results-format", "json"], tmp_path)
    assert json.loads(results.read_text())["top1"] == 100.0


def started(task_class: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    """What timm's script makes before its first step: a task with a moving average, an optimiser, a schedule."""
    torch.manual_seed(0)
    model = timm.create_model("demo_control_20", num_classes=2)
    optim, scheduler = importlib.import_module("timm.optim"), importlib.import_module("timm.scheduler")
    task = task_class(model=model, criterion=nn.CrossEntropyLoss(), verbose=False)
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    schedule, _ = scheduler.create_scheduler_v2(optimizer, sched="cosine", num_epochs=4)
    return task, optimizer, schedule


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# The pooling's channels-last gradient differs from its weight in the stride of a dimension of size 1 alone.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_a_checkpoint_of_timms_trainer_resumes_to_the_bit_also_distributed(tmp_path: Path, one_rank: None) -> None:
    tasks, utils = importlib.import_module("timm.task"), importlib.import_module("timm.utils")
    images_BCHW, labels_B = torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1])

    def train(task: Any, optimizer: torch.optim.Optimizer, schedule: Any, epochs: range) -> None:
        for epoch in epochs:
            torch.manual_seed(epoch)
            optimizer.zero_grad()
            task(images_BCHW, labels_B)["loss"].backward()
            optimizer.step()
            task.update_ema(step=epoch)
            schedule.step(epoch + 1)

    straight = started(tasks.ClassificationTask)
    straight[0].setup_ema(decay=0.5)
    train(*straight, range(2))
    saver = utils.CheckpointSaver(
        straight[0].get_trainable_module(), straight[1], task=straight[0], checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=0.0)
    train(*straight, range(2, 4))

    resumed = started(tasks.ClassificationTask)
    last = str(tmp_path / "last.pth.tar")
    assert tasks.resume_task_checkpoint(resumed[0], last, optimizer=resumed[1]) == 2
    resumed[0].setup_ema(decay=0.5)
    tasks.load_task_ema_checkpoint(resumed[0], last)
    resumed[2].step(2)
    # timm's script hands the CPU over as a device id, which torch refuses: on a CPU it runs in one process alone.
    resumed[0].prepare_distributed(device_ids=None)
    train(*resumed, range(2, 4))
    for ema in (False, True):
        states = [utils.unwrap_model(task.get_eval_model(ema=ema)).state_dict() for task in (straight[0], resumed[0])]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
