"""Whole runs with a teacher in ranks of its own: the students' weights, a restart, a teacher that fails, a dry run."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch import Tensor, nn

from data_pipelines.image.augment import AugmentConfig
from tests.distill.test_distill_apart import TEACHER, ten_classes
from tests.tiny import ROOT, sret_scale, tiny_config, tiny_shards, write_config

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


class Failing(nn.Module):
    """Fails at its sixth answer; the first is the check of the loading."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.num_calls = ten_classes()[0], 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls > 5:
            raise RuntimeError("the teacher broke")
        return self.layers(images_BCHW)


def failing() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A teacher that ends in the middle of a run."""
    return Failing(), (0.3,) * 3, (0.05,) * 3, 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    tiny = tiny_config(tiny_shards(folder))
    augment = AugmentConfig(randaugment_ops=1, erase_rate=0.2)
    distill = replace(tiny.distill, teacher=TEACHER)
    return write_config(folder / "tiny.yaml", replace(tiny, augment=augment, distill=distill), total_images=128)


def train(config: Path, name: str, ranks: int, *overrides: str) -> tuple[int, str, str]:
    process = sret_scale("train", config, *overrides, "--run", config.parent / name, "--ranks", str(ranks), cwd=ROOT)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def weights(config: Path, name: str) -> bytes:
    return max((config.parent / name).glob("checkpoints/*/weights.safetensors")).read_bytes()


@pytest.mark.parametrize("teacher_input", ["augmented", "view"])
def test_students_reach_the_weights_of_a_run_with_the_teacher_beside_them(config: Path, teacher_input: str) -> None:
    fields = [f"distill.teacher_input={teacher_input}"]
    status, output, errors = train(config, f"beside-{teacher_input}", 2, *fields)
    assert status == 0, output + errors
    # Two students of two micro-batches a step; three processes, and one teacher.
    status, output, errors = train(config, f"apart-{teacher_input}", 3, *fields, "distill.num_teacher_ranks=1")
    assert status == 0, output + errors
    assert weights(config, f"apart-{teacher_input}") == weights(config, f"beside-{teacher_input}")
    run = config.parent / f"apart-{teacher_input}"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "heartbeats" / "rank-00002.json").read_text())["phase"] == "serving"


def test_stopped_run_continues_with_the_teacher_beside_it_and_the_same_weights(config: Path) -> None:
    longer = ["train.total_images=512", "train.checkpoint_interval_images=0"]
    run = config.parent / "stopped"
    process = sret_scale(
        "train", config, *longer, "distill.num_teacher_ranks=1", "--run", run, "--ranks", "3", cwd=ROOT
    )
    metrics = config.parent / "stopped" / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 85, output + errors
    # Where the teacher runs may change on a restart: it decides nothing.
    status, output, errors = train(config, "stopped", 2, *longer)
    assert status == 0 and "continues with distill.num_teacher_ranks: 1 -> 0" in output, output + errors
    status, output, errors = train(config, "straight", 2, *longer)
    assert status == 0, output + errors
    assert weights(config, "stopped") == weights(config, "straight")


def test_teacher_that_fails_ends_the_job_and_is_named(config: Path) -> None:
    fields = [f"distill.teacher=module:{__name__}:failing", "distill.num_teacher_ranks=1"]
    status, output, errors = train(config, "failing", 3, *fields)
    assert status == 1, output + errors
    first, last = errors.strip().splitlines()[-2:]
    assert first.startswith("first error: rank 2 on ") and last == "error: RuntimeError: the teacher broke", errors


def test_killed_teacher_ends_the_job_and_is_named(config: Path) -> None:
    fields = ["train.total_images=51200", "distill.num_teacher_ranks=1"]
    process = sret_scale("train", config, *fields, "--run", config.parent / "killed", "--ranks", "3", cwd=ROOT)
    metrics = config.parent / "killed" / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.02)
    [teacher] = [pid for pid in below(process.pid) if b"RANK=2\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(teacher, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    # DeepSpeed's launcher may look first, and then the students' complaint counts: it names the rank too.
    assert "rank 2 was ended by SIGKILL" in last or "teacher rank 2 has ended" in last, errors


def below(pid: int) -> list[int]:
    """The rank processes below a process."""
    return [
        child.pid
        for child in psutil.Process(pid).children(recursive=True)
        if "sret_scale.launch.rank_bootstrap" in child.cmdline() and "--no_local_rank" not in child.cmdline()
    ]


def test_dry_run_shows_the_measured_rates_the_plan_and_who_is_who(config: Path) -> None:
    status, output, errors = train(config, "planned", 3, "distill.num_teacher_ranks=auto", "--dry-run")
    assert status == 0, output + errors
    assert "measured here (CPU)" in output and "; chosen: 1" in output
    assert "localhost: students on devices 0,1, the teacher on 2" in output
    assert "num_teacher_ranks: 1" in output
    assert not (config.parent / "planned").exists()
