"""Where a run starts, decided before anything starts: hostfiles, ssh commands, Slurm, ports."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.launch import nodes as places
from sret_scale.launch.hostfile import read_hostfile
from sret_scale.launch.job import Job, deepspeed_command
from sret_scale.launch.launcher import launch
from sret_scale.runs.rank_errors import RankError, first_error, write_error


@pytest.fixture
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(places, "visible_gpus", tuple)


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hostfile_of_deepspeeds_format_is_read_in_order(tmp_path: Path) -> None:
    hosts = read_hostfile(hostfile(tmp_path, "# the cluster\nnode-2 slots=4\n\n10.0.0.7   slots=1  # spare\n"))
    assert [(host.name, len(host.devices)) for host in hosts] == [("node-2", 4), ("10.0.0.7", 1)]


def test_a_hostfile_saved_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode-1 slots=2\r\n")
    assert [host.name for host in read_hostfile(tmp_path / "hosts")] == ["node-1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-oProxyCommand=evil slots=1", "line 1: '-oProxyCommand=evil' is not a host name"),
        ("$(reboot) slots=1", "is not a host name"),
        ("a;b slots=1", "is not a host name"),
        ("root@a slots=1", "is not a host name"),
        ("a slots=1\nA slots=2", "line 2: A is listed twice"),
        ("a slots=0", "a has 0 slots"),
        ("a", "expected 'NAME slots=N' or 'NAME devices=I,J,...', got 'a'"),
        ("a devices=", "expected 'NAME slots=N'"),
        ("a devices=1,-2", "expected 'NAME slots=N'"),
        ("a devices=3,3", "a has a device twice: 3,3"),
        ("a slots=1 extra", "expected 'NAME slots=N'"),
        ("a slots=-1", "expected 'NAME slots=N'"),
        ("a slots=99999", "expected 'NAME slots=N'"),
        ("# nothing", "names no host"),
    ],
)
def test_bad_hostfile_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_hostfile(hostfile(tmp_path, text))


def test_missing_hostfile_is_not_taken_for_this_machine(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_hostfile(tmp_path / "none")


def test_single_devices_of_a_host_are_chosen(tmp_path: Path) -> None:
    hosts = read_hostfile(hostfile(tmp_path, "node-2 devices=5,2\nnode-3 devices=0\n"))
    assert [(host.name, host.devices) for host in hosts] == [("node-2", ("5", "2")), ("node-3", ("0",))]


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_no_accepted_name_needs_quoting(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    path.write_text(f"{name} slots=1\n", encoding="utf-8", errors="replace")
    try:
        hosts = read_hostfile(path)
    except ValueError:
        return
    for host in hosts:
        assert shlex.quote(host.name) == host.name and not host.name.startswith("-")


@pytest.mark.usefixtures("outside_slurm")
def test_cpu_machine_gets_two_ranks_and_loopback() -> None:
    place = places.choose_nodes()
    assert [host.devices for host in place.hosts] == [("0", "1")]
    assert place.master_addr == "127.0.0.1"
    assert place.environment["GLOO_SOCKET_IFNAME"] == os.environ.get("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.usefixtures("outside_slurm")
def test_one_rank_a_gpu_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "visible_gpus", lambda: ("3", "GPU-a7"))
    place = places.choose_nodes()
    assert place.hosts[0].devices == ("3", "GPU-a7")
    with pytest.raises(ValueError, match="at most 2, one a GPU, got 3"):
        places.choose_nodes(num_ranks=3)


@pytest.mark.usefixtures("outside_slurm")
def test_remote_hosts_get_one_quoted_ssh_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a path/$(x)")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_TOKEN", "canary")
    path = hostfile(tmp_path, "127.0.0.2 slots=2\n127.0.0.3 slots=1\n")
    place = places.choose_nodes(hosts=read_hostfile(path))
    assert [start.command[0] for start in place.starts] == ["ssh", "ssh"]
    options, host, remote = place.starts[1].command[:-3], place.starts[1].command[-2], place.starts[1].command[-1]
    assert host == "127.0.0.3" and "BatchMode=yes" in options
    assert shlex.split(remote)[:2] == ["env", "PYTHONPATH=/a path/$(x)"]
    assert place.environment["NCCL_DEBUG"] == "INFO"
    assert "canary" not in repr(place)


@pytest.mark.usefixtures("outside_slurm")
def test_unreachable_host_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    path = hostfile(tmp_path, "127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    os.environ["SRET_SCALE_SSH_CONFIG"] = str(config := tmp_path / "ssh_config")
    config.write_text("Host *\n  Port 9\n")
    try:
        with pytest.raises(OSError, match=r"host 127\.0\.0\.2 was not reached by ssh .* 1 more host"):
            launch(tmp_path / "run", tmp_path / "config.yaml", hosts=read_hostfile(path))
    finally:
        del os.environ["SRET_SCALE_SSH_CONFIG"]
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.usefixtures("outside_slurm")
def test_a_machine_without_ssh_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    path = hostfile(tmp_path, "127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"host 127\.0\.0\.2 was not reached by ssh \(there is no ssh here: install it"):
        launch(tmp_path / "run", tmp_path / "config.yaml", hosts=read_hostfile(path))


def test_job_survives_its_line() -> None:
    job = Job(
        run_folder="/r\n$(x)",
        working_folder="/w",
        module="m",
        arguments=("a b", "-c"),
        world={"a": ("0", "1"), "b": ("0",)},
        master_addr="a",
        master_port=1,
        environment={"A": "`b`"},
    )
    assert Job.from_line(job.to_line()) == job
    assert job.to_line().count("\n") == 1 and job.world_size == 3
    command = deepspeed_command(job, 1)
    assert command[0] == sys.executable and command[-2:] == ["a b", "-c"] and "--node_rank=1" in command


def test_dry_run_prints_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path / "run", tmp_path / "config.yaml", num_ranks=3, dry_run=True) == 0
    output = capsys.readouterr().out
    assert "3 ranks on 1 node," in output and "deepspeed.launcher.launch" in output
    assert not (tmp_path / "run").exists()


def test_earliest_record_is_the_first_error_and_a_rank_keeps_its_first(tmp_path: Path) -> None:
    for rank, time_s, message in ((0, 5.0, "late"), (3, 2.0, "early"), (3, 1.0, "the same rank again")):
        write_error(tmp_path, RankError(time_s=time_s, rank=rank, host="h", message=message, exit_code=1))
    error = first_error(tmp_path)
    assert error is not None and error.message == "early"


@pytest.mark.multi_process
def test_a_launcher_imports_neither_torchvision_nor_deepspeed() -> None:
    """Both cost each command that starts a run seconds and more than a thousand files; only ranks need them."""
    heavy = "{'torchvision', 'torch._dynamo', 'deepspeed'}"
    code = f"import sys, sret_scale.launch.elastic; print(*({heavy} & {{*sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == []
