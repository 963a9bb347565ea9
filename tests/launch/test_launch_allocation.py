"""A Slurm allocation is used as granted, whatever form its variables have; without Slurm's commands it says so."""

import os
import sys
from pathlib import Path

import pytest

from sret_scale.cli import main
from sret_scale.launch import nodes
from sret_scale.launch.agent import start_launcher
from sret_scale.launch.job import Job
from sret_scale.launch.sbatch import requeue_running_job

SCONTROL = f"""#!{sys.executable} -S
import sys
words, details = sys.argv[1:], DETAILS
names = {{"n[1-2]": ["n1", "n2"], "n[1-3]": ["n1", "n2", "n3"], "n[2-3]": ["n2", "n3"]}}
if words[:2] == ["show", "hostnames"]:
    print("\\n".join(names.get(words[2], words[2:])))
elif words[:2] == ["show", "job"]:
    print(details)
else:
    sys.exit("Unable to contact slurm controller")
"""


def slurm(
    monkeypatch: pytest.MonkeyPatch, folder: Path, variables: dict[str, str], details: str = "", here: str = "login"
) -> None:
    """Inside job 77, with a scontrol that answers, and an srun that is never called."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_JOB_ID": "77", **variables}.items():
        monkeypatch.setenv(name, value)
    for name, text in (("scontrol", SCONTROL.replace("DETAILS", repr(details))), ("srun", "#!/bin/false\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(nodes, "visible_gpus", tuple)
    monkeypatch.setattr("socket.gethostname", lambda: here)


TWO = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
THREE = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]"}
UNEVEN = """JobId=77 JobName=x
   JOB_GRES=gpu:a100:6
     Nodes=n1 CPU_IDs=0-31 Mem=1000 GRES=gpu:a100:4(IDX:0-3)
     Nodes=n[2-3] CPU_IDs=0-7 Mem=1000 GRES=gpu:a100:1(IDX:2)"""


@pytest.mark.parametrize(
    ("variables", "details", "counts"),
    [
        (TWO | {"SLURM_GPUS_PER_NODE": "4"}, "", [4, 4]),
        (TWO | {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_NTASKS_PER_NODE": "1"}, "", [4, 4]),
        (TWO | {"SLURM_GPUS_PER_NODE": "a100:2,v100:1"}, "", [3, 3]),
        (TWO | {"SLURM_GPUS_ON_NODE": "8"}, "", [8, 8]),
        (TWO | {"SLURM_GPUS_ON_NODE": "4(x2)"}, "", [4, 4]),
        (THREE | {"SLURM_GPUS_ON_NODE": "4"}, UNEVEN, [4, 1, 1]),
        (THREE | {"SLURM_TASKS_PER_NODE": "4(x2),2"}, "", [4, 4, 2]),
        (TWO | {"SLURM_NTASKS_PER_NODE": "16"}, "", [16, 16]),
        (TWO, "", [1, 1]),
        ({"SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]"}, "", [1, 1]),
    ],
)
def test_an_allocation_is_used_as_granted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], details: str, counts: list[int]
) -> None:
    slurm(monkeypatch, tmp_path, variables, details)
    place = nodes.choose_nodes()
    assert [(host.name, len(host.devices)) for host in place.hosts] == [
        (f"n{index + 1}", count) for index, count in enumerate(counts)
    ]
    assert place.starts[0].command[0] == "srun" and f"--nodes={len(counts)}" in place.starts[0].command
    assert [len(host.devices) for host in nodes.choose_nodes(num_ranks=3).hosts] == [3] * len(counts)


def test_uneven_nodes_are_asked_for_no_more_processors_than_the_smallest_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm(monkeypatch, tmp_path, THREE | {"SLURM_JOB_CPUS_PER_NODE": "32,8(x2)"})
    assert "--cpus-per-task=8" in nodes.choose_nodes().starts[0].command


def test_a_node_without_a_gpu_among_others_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm(monkeypatch, tmp_path, TWO, UNEVEN.replace("n[2-3]", "n3"))
    with pytest.raises(ValueError, match="granted no GPU on n2"):
        nodes.choose_nodes()


@pytest.mark.parametrize(
    ("variables", "here", "expected"),
    [
        ({}, "login", "n1"),
        ({}, "n1.cluster.local", "localhost"),
        ({"SLURMD_NODENAME": "n1"}, "a-container", "localhost"),
        ({"SLURM_JOB_NODELIST": ""}, "login", "localhost"),
    ],
)
def test_a_node_that_salloc_granted_is_used_from_the_login_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], here: str, expected: str
) -> None:
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_PER_NODE": "2"}
    slurm(monkeypatch, tmp_path, one | variables, here=here)
    assert [(host.name, len(host.devices)) for host in nodes.choose_nodes().hosts] == [(expected, 2)]


def test_without_srun_the_one_node_is_this(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm(monkeypatch, tmp_path, {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"})
    (tmp_path / "srun").unlink()
    assert nodes.choose_nodes().hosts[0].name == "localhost"


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "there is no scontrol here"), ("echo Unable to contact >&2; exit 1", "scontrol show: Unable to contact")],
)
def test_without_scontrol_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str | None, reason: str
) -> None:
    slurm(monkeypatch, tmp_path, TWO)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    if script is None:
        monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["doctor", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"error: Slurm's job 77: {reason}; " in error and "unset SLURM_JOB_ID" in error


@pytest.mark.parametrize("has_scontrol", [False, True])
def test_a_job_that_cannot_be_requeued_keeps_its_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_scontrol: bool
) -> None:
    slurm(monkeypatch, tmp_path, TWO, "JobState=RUNNING BatchFlag=1")
    if not has_scontrol:
        monkeypatch.setenv("PATH", "/nonexistent")
    requeue_running_job("77")
    assert "the same command continues" in capsys.readouterr().err


def test_ranks_get_the_gpus_that_the_node_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Job] = []

    def command(job: Job, _: int) -> list[str]:
        started.append(job)
        return ["true"]

    monkeypatch.setattr("sret_scale.launch.agent.visible_gpus", lambda: ("4", "5", "6"))
    monkeypatch.setattr("sret_scale.launch.agent.deepspeed_command", command)
    job = Job(
        run_folder=str(tmp_path), working_folder=str(tmp_path), module="m", arguments=(),
        world={"n1": ("0",), "n2": ("0", "1")}, master_addr="127.0.0.1", master_port=1,
    )  # fmt: skip
    start_launcher(job, 1).wait()
    assert started[0].world == {"n1": ("0",), "n2": ("4", "5")}
