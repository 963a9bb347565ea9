"""A real Slurm: a job that is warned, preempted or cancelled; what goes on ends with the weights of an undisturbed run.

tests/cluster/install.sh && ./launch.sh test -m slow tests/launch/test_cluster_slurm.py
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.launch.sbatch import BatchOptions, batch_file
from tests.cluster.slurm import Slurm, why_not

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.skipif(bool(why_not()), reason=why_not())]

ROOT = Path(__file__).parents[2]
OPTIONS = BatchOptions(nodes=2, gpus=0, cpus=2, time="0:30:00")


@dataclass(frozen=True)
class Setting:
    """A cluster, the arguments of a small training, and the weights that two local ranks reach with it."""

    slurm: Slurm
    arguments: list[str]
    weights: bytes


def weights_of(run: Path) -> bytes:
    return max(run.glob("checkpoints/*/weights.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["PYTHONPATH"] = str(ROOT)
    # The threads of a matrix product decide its rounding.
    os.environ["OMP_NUM_THREADS"] = "1"
    source = ROOT / "data_pipelines" / "sample" / "fashion_mnist"
    for split in ("train", "test"):
        write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=1000), folder / split)
    arguments = [
        "train",
        "demo_control_20",
        f"data.train_folder={folder / 'train'}",
        f"data.test_folder={folder / 'test'}",
    ]
    arguments += [
        "train.total_images=960",
        "train.global_batch_size=24",
        "train.micro_batch_size=12",
        "optim.warmup_images=0",
    ]
    command = [sys.executable, "-m", "sret_scale.cli", *arguments, "--run", str(folder / "local"), "--ranks", "2"]
    subprocess.run(command, check=True, timeout=400, cwd=folder)
    with Slurm(folder) as slurm:
        yield Setting(slurm, arguments, weights_of(folder / "local"))


def submit(setting: Setting, run: Path, *options: str) -> int:
    job = setting.slurm.submit(batch_file(OPTIONS, [*setting.arguments, "--run", str(run)]), *options)
    deadline_s = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline_s, setting.slurm.log(job)
        assert setting.slurm.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), setting.slurm.log(job)
        time.sleep(0.2)
    return job


def test_warned_job_saves_requeues_itself_and_ends_with_the_same_weights(setting: Setting, tmp_path: Path) -> None:
    job = submit(setting, tmp_path / "run")
    # What --signal=B:USR1@300 does before the time limit.
    setting.slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    setting.slurm.wait(job, ["PENDING", "COMPLETING"], 100)
    assert setting.slurm.wait(job, ["COMPLETED", "FAILED", "CANCELLED"], 400) == "COMPLETED", setting.slurm.log(job)
    assert "requeueing job" in setting.slurm.log(job)
    assert weights_of(tmp_path / "run") == setting.weights


def test_preempted_job_continues_with_the_same_weights(setting: Setting, tmp_path: Path) -> None:
    job = submit(setting, tmp_path / "run", "--partition=low")
    urgent = setting.slurm.submit("#!/bin/bash\nsleep 2\n", "--partition=high", "--nodes=2", "--exclusive")
    assert setting.slurm.wait(urgent, ["COMPLETED", "FAILED"], 200) == "COMPLETED"
    assert setting.slurm.wait(job, ["COMPLETED", "FAILED", "CANCELLED"], 400) == "COMPLETED", setting.slurm.log(job)
    assert weights_of(tmp_path / "run") == setting.weights


def test_cancelled_job_leaves_no_process_and_stays_cancelled(setting: Setting, tmp_path: Path) -> None:
    job = submit(setting, tmp_path / "run")
    setting.slurm.run("scancel", str(job))
    deadline_s = time.monotonic() + 100
    while any(str(tmp_path) in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
    setting.slurm.wait(job, ["CANCELLED"], 60)
