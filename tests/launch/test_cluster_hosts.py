"""Three hosts with their own addresses and sshd: the launcher over ssh, a host lost in the middle, going on without it.

tests/cluster/install.sh && ./launch.sh test -m slow tests/launch/test_cluster_hosts.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.writing.write import WriteConfig, write_shards
from tests.cluster.hosts import Hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.skipif(bool(why_not()), reason=why_not())]

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
base: demo_control_20
set:
  train.total_images: 48
  train.global_batch_size: 24
  train.micro_batch_size: 12
  optim.warmup_images: 0
  data.train_folder: {folder}/train
  data.test_folder: {folder}/test
runs:
  - {{name: first, train.seed: 1}}
  - {{name: broken, distill.teacher: "module:tests.no_such_teacher:make"}}
  - {{name: second, train.seed: 2}}
  - {{name: third, train.seed: 3}}
retries: 0
"""
START = """
import sys
from pathlib import Path
from sret_scale.launch.launcher import launch
from sret_scale.launch.hostfile import hosts_of
folder = Path(sys.argv[1])
sys.exit(launch(folder, folder / "config.yaml", hosts=hosts_of(Path(sys.argv[2])), module="tests.ranks.toy_rank"))
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made


def start(hosts: Hosts, folder: Path, action: str, indices: list[int]) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(action)
    return subprocess.Popen(
        [sys.executable, "-c", START, str(folder), str(hosts.hostfile(indices))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SRET_SCALE_SSH_CONFIG": str(hosts.ssh_config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def wait_for_files(process: "subprocess.Popen[str]", *files: Path) -> None:
    deadline_s = time.monotonic() + 90
    while not all(file.exists() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def ranks_on(hosts: Hosts, index: int) -> list[str]:
    lines = []
    for pid in hosts.processes_of(index):
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        except FileNotFoundError:
            continue
    return [line for line in lines if "sret_scale" in line]


def test_ranks_of_three_hosts_meet_and_leave_nothing(hosts: Hosts, tmp_path: Path) -> None:
    folder = tmp_path / "a run; $(touch evil)"
    output, errors = (process := start(hosts, folder, "all_reduce", [0, 1, 2])).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [(folder / f"sum-{rank}").read_text() for rank in range(3)] == ["6.0", "6.0", "6.0"]
    assert output == "hello from rank 0\n"
    # A stranger on another network of a host finds no open port of the job.
    assert [(folder / f"listens-{rank}").read_text() for rank in range(3)] == hosts.addresses
    assert [ranks_on(hosts, index) for index in range(3)] == [[], [], []]


def test_sigterm_reaches_the_ranks_of_all_hosts(hosts: Hosts, tmp_path: Path) -> None:
    process = start(hosts, folder := tmp_path / "run", "sleep", [0, 1, 2])
    wait_for_files(process, *(folder / f"pid-{rank}" for rank in range(3)))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"stopped"' in (folder / "status.json").read_text()
    assert [ranks_on(hosts, index) for index in range(3)] == [[], [], []]


def test_killed_launcher_leaves_no_rank_on_any_host(hosts: Hosts, tmp_path: Path) -> None:
    process = start(hosts, folder := tmp_path / "run", "sleep", [0, 1, 2])
    wait_for_files(process, *(folder / f"pid-{rank}" for rank in range(3)))
    process.kill()
    process.communicate(timeout=60)
    deadline_s = time.monotonic() + 30
    while any(ranks_on(hosts, index) for index in range(3)):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_unreachable_host_is_named_and_nothing_starts(hosts: Hosts, tmp_path: Path) -> None:
    hosts.addresses.append("10.77.0.9")
    try:
        process = start(hosts, tmp_path / "run", "all_reduce", [0, 3])
        _, errors = process.communicate(timeout=60)
    finally:
        hosts.addresses.pop()
    assert process.returncode != 0
    assert "host 10.77.0.9 was not reached by ssh" in errors
    assert not (tmp_path / "run" / "logs").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    source = ROOT / "data_pipelines" / "sample" / "fashion_mnist"
    for split in ("train", "test"):
        write_shards(WriteConfig(kind="idx", source=source, split=split, shard_samples=1000), folder / split)
    return [f"data.{split}_folder={folder / split}" for split in ("train", "test")]


def test_three_hosts_train_to_the_weights_of_three_local_ranks(hosts: Hosts, data: list[str], tmp_path: Path) -> None:
    sizes = [
        "train.total_images=240",
        "train.global_batch_size=24",
        "train.micro_batch_size=8",
        "optim.warmup_images=0",
    ]
    command = [sys.executable, "-m", "sret_scale.cli", "train", "demo_control_20", *data, *sizes]
    places = {"local": ["--ranks", "3"], "hosts": ["--hostfile", str(hosts.hostfile([0, 1, 2]))]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SRET_SCALE_SSH_CONFIG": str(hosts.ssh_config)}
    weights = {}
    for name, place in places.items():
        run = tmp_path / name
        subprocess.run([*command, "--run", str(run), *place], env=environment, check=True, cwd=tmp_path, timeout=300)
        weights[name] = next(run.glob("checkpoints/*/weights.safetensors")).read_bytes()
    assert weights["local"] == weights["hosts"]


def test_lost_host_is_named_and_the_rest_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    process = start(hosts, folder := tmp_path / "run", "all_reduce_forever", [0, 1, 2])
    wait_for_files(process, *(folder / f"sum-{rank}" for rank in range(3)))
    hosts.cut(2)
    began_s = time.monotonic()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: host 10.77.0.3 was lost"), errors
    assert time.monotonic() - began_s < 60
    assert [ranks_on(hosts, index) for index in (0, 1)] == [[], []]
    again = start(hosts, folder, "all_reduce", [0, 1])
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert (folder / "sum-1").read_text() == "3.0"
    hosts.join(2)


def test_elastic_run_goes_on_by_itself_without_the_lost_host(hosts: Hosts, data: list[str], tmp_path: Path) -> None:
    sizes = ["train.total_images=960", "train.global_batch_size=24", "train.micro_batch_size=8"]
    sizes += ["optim.warmup_images=0", "train.checkpoint_interval_images=96"]
    command = [sys.executable, "-m", "sret_scale.cli", "train", "demo_control_20", *data, *sizes]
    command += ["--run", str(tmp_path / "run"), "--hostfile", str(hosts.hostfile([0, 1, 2])), "--elastic", "2:3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SRET_SCALE_SSH_CONFIG": str(hosts.ssh_config)}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline_s = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
        time.sleep(0.1)
    hosts.cut(2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "3 of 3 hosts" in output and "2 of 3 hosts (10.77.0.1, 10.77.0.2), micro-batch 6" in output
    assert "host 10.77.0.3" in errors
    assert '"finished"' in (tmp_path / "run" / "status.json").read_text()
    hosts.join(2)


def test_sweep_packs_runs_on_single_devices_and_one_fails_alone(hosts: Hosts, data: list[str], tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("10.77.0.1 devices=0,3\n10.77.0.2 devices=2\n10.77.0.3 slots=1\n")
    experiment = tmp_path / "packed.yaml"
    experiment.write_text(EXPERIMENT.format(folder=Path(data[0].partition("=")[2]).parent))
    command = [sys.executable, "-m", "sret_scale.cli", "sweep", str(experiment), "--folder", str(tmp_path / "runs")]
    process = subprocess.run(
        [*command, "--hostfile", str(hostfile), "--per-gpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SRET_SCALE_SSH_CONFIG": str(hosts.ssh_config)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert "3 of 4 runs finished" in process.stdout and "failed: broken: " in process.stdout, process.stdout
    places = {}
    for run in ("first", "second", "third"):
        assert '"finished"' in (tmp_path / "runs" / run / "status.json").read_text()
        heartbeat = json.loads((tmp_path / "runs" / run / "heartbeats" / "rank-00000.json").read_text())
        places[run] = heartbeat["host"]
    # Three of the four slots are on different hosts.
    assert set(places.values()) <= {"host-1", "host-2", "host-3"} and len(set(places.values())) > 1, places
    assert [ranks_on(hosts, index) for index in range(3)] == [[], [], []]
