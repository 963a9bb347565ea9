"""`sret-scale doctor` and `sret-scale slurm`: what they find and print, and that no value becomes a shell word."""

import argparse
import importlib.metadata
import os
import shlex
import shutil
import socket
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sret_scale import cli
from sret_scale.commands import doctor
from sret_scale.launch.doctor.checks import (
    Finding,
    check_apex,
    check_decoder,
    check_devices,
    check_folder,
    check_torchvision,
    check_versions,
)
from sret_scale.launch.doctor.inputs import check_teacher
from sret_scale.launch.doctor.measured import Probe, judge
from sret_scale.launch.sbatch import BatchOptions, batch_file
from sret_scale.train.distributed import Ranks, join_ranks
from tests.tiny import tiny_config, tiny_shards, write_config


def two_classes() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """A teacher, as `module:` takes it."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    return network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8


def probe(
    rank: int,
    *,
    host: str = "a",
    torch: str = "2.13.0",
    clock_s: float = 5.0,
    rate: float = 1e12,
    findings: tuple[Finding, ...] = (),
) -> Probe:
    return Probe(
        rank=rank,
        host=host,
        torch=torch,
        device="cpu",
        clock_s=clock_s,
        matmul_per_s=rate,
        all_reduce_bytes_per_s=1e9,
        findings=findings,
    )


def states(probes: list[Probe]) -> dict[str, str]:
    return {finding.name: finding.state for finding in judge(probes, here="a")}


def test_healthy_ranks_are_ok() -> None:
    assert set(states([probe(0), probe(1, host="b")]).values()) == {"ok"}


def test_slow_device_late_clock_and_other_torch_are_named() -> None:
    probes = [probe(0), probe(1), probe(2, host="b", rate=0.8e12, clock_s=9.0, torch="2.12.0")]
    found = states(probes)
    assert (found["slow device"], found["clocks"], found["same torch"]) == ("warn", "warn", "fail")
    assert any("rank 2 on b: 80%" in finding.text for finding in judge(probes, here="a"))


@pytest.mark.parametrize(
    ("torch", "deepspeed", "expected"),
    [
        ("2.13.0+cpu", "0.19.8", ("ok", "ok")),
        ("2.10.1", "0.19.9", ("fail", "fail")),
        ("3.0", "0.19", ("ok", "fail")),
    ],
)
def test_versions_are_judged(torch: str, deepspeed: str, expected: tuple[str, str]) -> None:
    found = {"torch": torch, "deepspeed": deepspeed, "webdataset": "1.0.2"}
    result = {finding.name: finding.state for finding in check_versions(found.__getitem__)}
    assert (result["torch"], result["deepspeed"]) == expected


def test_missing_package_says_how_to_install_it() -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert all("pip install" in finding.advice for finding in check_versions(nothing) if finding.name != "python")


def test_other_project_called_apex_is_refused(tmp_path: Path) -> None:
    spec = ModuleSpec("apex", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    assert check_apex(spec).state == "fail"
    (tmp_path / "normalization").mkdir()
    assert check_apex(spec).state == "ok"
    assert check_apex(None).state == "ok"


def test_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b").state in ("ok", "warn")
    assert [check_decoder(has, False).state for has in (True, False)] == ["ok", "warn"]
    assert "other sources" in check_decoder(False, True).text


@pytest.mark.multi_process
def test_doctor_measures_two_ranks_and_names_missing_shards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    arguments = ["--folder", str(tmp_path / "runs"), "--ranks", "2", "--shards", str(tmp_path / "none")]
    assert doctor.run(parser.parse_args(arguments)) == 1
    output = capfd.readouterr().out
    assert "FAIL  shards" in output and "2 ranks on 1 host met" in output and "all-reduce" in output
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_wrong_on_another_node_is_said_with_its_name() -> None:
    fine, bad = Finding(name="disk", state="ok", text="enough"), Finding(name="disk", state="fail", text="full")
    probes = [probe(0, findings=(bad,)), probe(1, host="b", findings=(fine, bad))]
    said = [finding.text for finding in judge(probes, here="a") if finding.name == "disk"]
    assert said == ["b: full"]


def test_teacher_is_loaded_for_the_classes_of_the_shards() -> None:
    spec = "module:tests.launch.test_launch_doctor:two_classes"
    assert check_teacher(spec, ["a", "b"]) == Finding(name="teacher", state="ok", text=f"{spec} answers for 2 classes")
    wrong = check_teacher(spec, ["a", "b", "c"])
    assert wrong.state == "fail" and "3" in wrong.text
    assert check_teacher("module:tests.nowhere:nothing", ["a", "b"]).state == "fail"


def test_teacher_without_shards_is_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    with pytest.raises(ValueError, match="--teacher needs --shards"):
        doctor.run(parser.parse_args(["--folder", str(tmp_path), "--teacher", "run:x"]))


def options(**changes: object) -> BatchOptions:
    values: dict[str, object] = {"nodes": 2, "gpus": 8, "cpus": 16, "time": "1:00:00", **changes}
    return BatchOptions(**values)  # type: ignore[arg-type]


def test_batch_file_asks_for_one_launcher_a_node_a_warning_and_requeue() -> None:
    lines = batch_file(options(), ["train", "sret_t"]).splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=B:USR1@300", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert lines[-1].startswith("exec ") and lines[-1].endswith("sret_scale.cli train sret_t")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), max_size=4))
def test_arguments_survive_the_shell_as_they_are(arguments: list[str]) -> None:
    command = batch_file(options(), arguments).partition("\nexec ")[2]
    assert shlex.split(command)[4:] == arguments


@pytest.mark.parametrize("value", ["1\n#SBATCH --uid=0", "a b", "$(x)", "`x`", "'x'", "-p", "a;b"])
def test_value_that_is_not_plain_is_refused(value: str) -> None:
    for name in ("time", "partition", "account", "name"):
        with pytest.raises(ValueError, match="without blanks or quotes"):
            batch_file(options(**{name: value}), ["train"])


@pytest.mark.parametrize(("time", "is_valid"), [("90", True), ("2-12", True), ("1-00:00:00", True), ("soon", False)])
def test_the_time_limit_is_slurms(time: str, is_valid: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", "--nodes", "1", "--cpus", "2", "--time", time, "--"]
    assert cli.main([*words, "train", "sret_t"]) == (0 if is_valid else 2)
    assert cli.main([*words, "trian", "sret_t"]) == 2
    assert "expected a command of sret-scale after --" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["/scratch/me/%j.out", "%j.out", "./logs/%x-%j.out", "../%j"])
def test_output_goes_where_slurm_may_write(output: str) -> None:
    assert f"#SBATCH --output={output}" in batch_file(options(output=output), ["train"]).splitlines()
    with pytest.raises(ValueError, match="--warning: expected 0 or more seconds, got -5"):
        batch_file(options(warning=-5), ["train"])


SLURM = ["slurm", "--nodes", "2", "--cpus", "2", "--time", "60"]


def test_the_batch_file_has_what_a_cluster_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = tmp_path / "the env.sh"
    setup.write_text("module load cuda\nexport NCCL_DEBUG=INFO\n")
    more = [
        "--mem",
        "200G",
        "--exclusive",
        "--output",
        "logs/%j.out",
        "--sbatch=--constraint=a100",
        "--sbatch=--qos=long",
    ]
    assert cli.main([*SLURM, *more, "--setup", str(setup), "--", "describe", "sret_t"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in ("--mem=200G", "--exclusive", "--output=logs/%j.out", "--constraint=a100", "--qos=long"):
        assert f"#SBATCH {line}" in lines
    assert lines.index(f". '{setup}' || exit 2") == len(lines) - 1 - (1 + ("PYTHONPATH" in os.environ))
    for bad in (["--sbatch=x\n#SBATCH --uid=0"], ["--sbatch=--a=b\nrm"], ["--setup", "absent.sh"], ["--mem", "1 G"]):
        assert cli.main([*SLURM, *bad, "--", "describe", "sret_t"]) == 2, bad
        assert capsys.readouterr().out == ""


@pytest.mark.lengthy
def test_a_command_that_its_start_would_refuse_gives_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tiny_shards(tmp_path / "shards")
    file = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    assert cli.main([*SLURM, "--", "train", str(file)]) == 0
    capsys.readouterr()
    for bad, message in (
        (["optim.lr=3"], "optim.lr"),
        (["train.micro_batch_size=7"], "not a multiple of train.micro_batch_size=7 x 2 ranks"),
        (["optim.warmup_images=9999"], "leaves nothing of train.total_images"),
    ):
        assert cli.main([*SLURM, "--", "train", str(file), *bad]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.out == ""
    with pytest.raises(SystemExit):
        cli.main([*SLURM, "--", "train", str(file), "--rangs", "2"])
    assert "sret-scale train: error: unrecognized arguments: --rangs 2" in capsys.readouterr().err
    assert cli.main([*SLURM, "--", "train", str(file), "--run", "runs/x"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--run runs/x")
    # What only the nodes see is said, and prevents nothing.
    assert cli.main([*SLURM, "--", "train", str(file), f"data.train_folder={tmp_path}/elsewhere"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: not all of the command could be checked here") and "exec " in shown.out


@pytest.mark.lengthy
def test_a_preview_of_a_hostfile_needs_no_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(tiny_shards(tmp_path / "shards")))
    (tmp_path / "hosts").write_text("node-1.of.no.domain.invalid slots=1\nnode-2.of.no.domain.invalid slots=1\n")
    words = ["train", str(file), "--hostfile", str(tmp_path / "hosts"), "--run", str(tmp_path / "run")]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "2 ranks on 2 nodes, rendezvous at node-1.of.no.domain.invalid:" in capsys.readouterr().out
    assert cli.main(words) == 2
    assert "has no address here" in capsys.readouterr().err


def test_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nand a long trace")

    monkeypatch.setattr("sret_scale.launch.doctor.checks.importlib.import_module", broken)
    found = check_torchvision()
    assert (found.state, found.text) == ("fail", "operator torchvision::nms does not exist")
    assert "constraints.txt torchvision" in found.advice


def test_gpus_that_torch_does_not_see_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("sret_scale.launch.doctor.checks.visible_gpus", lambda: ("0", "1"))
    found = check_devices()
    assert found.state == "fail" and "nvidia-smi shows 2 GPUs" in found.text and "driver" in found.advice


def test_little_room_no_right_to_write_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    few = check_folder(tmp_path)
    assert few.state == "warn" and "20 GiB" in few.advice
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert check_folder(tmp_path).state == "fail"


def test_taken_port_says_which_address_and_what_must_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
        with pytest.raises(OSError, match=r"rank 0 cannot listen on 127\.0\.0\.1:\d+ .*MASTER_ADDR must be"):
            join_ranks(alone, "gloo")


def test_doctor_and_evaluate_show_what_they_would_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "hosts").write_text("127.0.0.2 devices=1,3\n")
    before = sorted(tmp_path.rglob("*"))
    for command in (["doctor"], ["evaluate", "run"], ["evaluate", "run", "--early-exit", "entropy"]):
        assert cli.main([*command, "--hostfile", "hosts", "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "start on 127.0.0.2: ssh" in said and "devices 1,3" in said and "deepspeed.launcher.launch" in said
    assert cli.main(["evaluate", "run", "--dry-run"]) == 0
    assert "evaluate in this process" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
