"""Three hosts with their own sshd write one shard set: all take part, a killed command leaves nothing behind.

tests/cluster/install.sh && ./launch.sh test -m slow tests/launch/test_cluster_shards.py
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.cluster.hosts import Hosts, why_not
from tests.data.shard_sources import make_tree
from tests.data.test_shards_write import assert_same_files

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.skipif(bool(why_not()), reason=why_not())]

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 150


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("source") / 'a "tree"; $(touch evil)', 2 * NUM_SHARDS)


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as one process writes it."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    write_shards(WriteConfig(kind="folder", source=tree, shard_samples=6), folder)
    return folder


def start(hosts: Hosts, tree: Path, target: Path, hostfile: Path) -> "subprocess.Popen[str]":
    options = ["--shard-samples", "6", "--workers", "1", "--hostfile", str(hostfile)]
    return subprocess.Popen(
        [sys.executable, "-m", "sret_scale.cli", "shards", "write", "folder", str(tree), str(target), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SRET_SCALE_SSH_CONFIG": str(hosts.ssh_config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=target.parent,
    )


def writers(target: Path) -> set[str]:
    """The hosts that are at a shard now, by the names of their unfinished files."""
    return {path.name.split(".")[2] for path in target.glob(f"{WORK_FOLDER}/shard-*.tmp")}


def wait_for_writers(process: "subprocess.Popen[str]", target: Path, wanted: set[str]) -> None:
    seen: set[str] = set()
    deadline_s = time.monotonic() + 120
    while not wanted <= seen:
        assert process.poll() is None, (seen, process.communicate())
        assert time.monotonic() < deadline_s, seen
        seen |= writers(target)


def test_three_hosts_write_what_one_would_have_written(hosts: Hosts, tree: Path, whole: Path, tmp_path: Path) -> None:
    process = start(hosts, tree, target := tmp_path / "set", hosts.hostfile([0, 1, 2]))
    wait_for_writers(process, target, {"host-1", "host-2", "host-3"})
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert [line.split(":")[0] for line in lines] == hosts.addresses
    assert all(f"900 samples of 3 classes in {NUM_SHARDS} shards" in line for line in lines)
    assert_same_files(target, whole)
    assert verify_shards(target) == []
    assert not (tmp_path / "evil").exists()


def test_a_killed_command_stops_all_hosts_and_the_next_one_goes_on(
    hosts: Hosts, tree: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(hosts, tree, target := tmp_path / "set", hosts.hostfile([0, 1, 2]))
    wait_for_writers(process, target, {"host-1", "host-2", "host-3"})
    process.kill()
    process.communicate(timeout=60)
    deadline_s = time.monotonic() + 30
    while any(_python(hosts, index) for index in range(3)):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    num_written = len(list(target.glob("*.tar")))
    assert 0 < num_written < NUM_SHARDS and not (target / "manifest.json").exists()
    # Two of the hosts finish what three began.
    _, errors = (process := start(hosts, tree, target, hosts.hostfile([0, 1]))).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_files(target, whole)


def test_a_host_out_of_reach_is_named_and_the_others_stop(hosts: Hosts, tree: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"{hosts.addresses[0]} slots=1\n10.77.0.9 slots=1\n")
    process = start(hosts, tree, tmp_path / "set", hostfile)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: host 10.77.0.9: "), errors
    assert _python(hosts, 0) == []


def _python(hosts: Hosts, index: int) -> list[int]:
    """The writers of a host that are alive."""
    found = []
    for pid in hosts.processes_of(index):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except FileNotFoundError:
            continue
        if "sret_scale" in command:
            found.append(pid)
    return found
