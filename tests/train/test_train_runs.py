"""Whole runs through the command line: two ranks, killed, stopped, continued, and every bad input a user may give."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from data_pipelines.shards.index import open_shards
from sret_scale.cli import main
from sret_scale.runs.checkpoint import list_checkpoints, read_state
from tests.forked import sret_scale_forked
from tests.runs import complete_lines, digest, rank_processes, wait_for_images
from tests.tiny import CANARY, NUM_IMAGES, TINY_MODEL, sret_scale, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process

Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def untouched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("untouched")
    config = write_config(folder / "tiny.yaml", tiny_config(shards))
    assert finish(sret_scale("train", config, "--run", folder / "run", cwd=folder)) == 0
    return folder / "run"


def finish(process: Process) -> int:
    out, error = process.communicate(timeout=240)
    print(out, error)
    return process.returncode


def test_a_run_leaves_what_its_readers_need(untouched: Path) -> None:
    lines = complete_lines(untouched / "metrics.jsonl")
    kinds = [line["kind"] for line in lines]
    assert kinds.count("train") == 16 and kinds.count("eval") == 2 and kinds.count("memory") == 1
    assert [line["images"] for line in lines if line["kind"] == "train"] == list(range(32, 513, 32))
    assert {line["num_samples"] for line in lines if line["kind"] == "eval"} == {NUM_IMAGES}
    assert json.loads((untouched / "status.json").read_text())["state"] == "finished"
    environment = json.loads((untouched / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["nodes"] == [{name: environment[name] for name in ("cpu", "num_cpus", "gpu")}]
    assert json.loads((untouched / "model.json").read_text())["applications"] == TINY_MODEL.num_applications
    assert len(list_checkpoints(untouched / "checkpoints")) == 2


def test_a_finished_run_is_not_run_again(untouched: Path, shards: Path) -> None:
    before = (untouched / "metrics.jsonl").read_bytes()
    ended = sret_scale_forked("train", untouched / "config.yaml", cwd=untouched)
    assert ended.returncode == 0 and "is finished" in ended.stdout
    assert (untouched / "metrics.jsonl").read_bytes() == before


def test_killed_three_times_ends_with_the_weights_of_a_run_left_alone(
    untouched: Path, shards: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    run, chance = tmp_path / "run", random.Random(5)
    for kill in range(3):
        process = sret_scale("train", config, "--run", run, cwd=tmp_path)
        wait_for_images(run, 32 + 160 * kill + 32 * chance.randrange(3), process)
        time.sleep(chance.random() * 0.05)
        victims = rank_processes(process)
        chance.choice(victims).kill() if victims else process.kill()
        out, error = process.communicate(timeout=120)
        assert process.returncode != 0, out + error
        assert error.strip().splitlines()[-1].startswith("error: "), error
    assert sret_scale_forked("train", config, "--run", run, cwd=tmp_path).returncode == 0
    assert digest(run) == digest(untouched)
    assert [line["kind"] for line in complete_lines(run / "metrics.jsonl")].count("restart") >= 2


def test_sigterm_saves_and_the_same_command_continues_to_the_same_weights(
    untouched: Path, shards: Path, tmp_path: Path
) -> None:
    # No checkpoint is due in between, so the one that is found is the signal's.
    config = write_config(tmp_path / "tiny.yaml", tiny_config(shards), checkpoint_interval_images=0)
    run = tmp_path / "run"
    process = sret_scale("train", config, "--run", run, cwd=tmp_path)
    wait_for_images(run, 160, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 85
    assert time.monotonic() - asked < 60
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert 160 <= read_state(list_checkpoints(run / "checkpoints")[0])["images"] < 512
    assert sret_scale_forked("train", config, "--run", run, cwd=tmp_path).returncode == 0
    assert digest(run) == digest(untouched)


def test_a_second_job_on_a_run_is_refused_and_the_first_goes_on(shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    first = sret_scale("train", config, "--run", tmp_path / "run", cwd=tmp_path)
    wait_for_images(tmp_path / "run", 32, first)
    second = sret_scale_forked("train", config, "--run", tmp_path / "run", cwd=tmp_path)
    assert second.returncode == 2 and "is in use by another running job" in second.stderr
    assert finish(first) == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    untouched: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    newest = list_checkpoints(run / "checkpoints")[0]
    content = bytearray((newest / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "weights.safetensors").write_bytes(content)
    (run / "status.json").unlink()
    ended = sret_scale_forked("train", run / "config.yaml", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint passed over: {newest / 'weights.safetensors'}: expected sha256" in ended.stdout
    assert digest(run) == digest(untouched)


def test_another_architecture_is_refused(untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    (run / "status.json").unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("num_loops: 3", "num_loops: 4"))
    ended = sret_scale_forked("train", run / "config.yaml", cwd=tmp_path)
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert "another architecture" in last and "stages.0.num_loops: 3 -> 4" in last


def test_a_rank_that_stands_still_is_named_and_everything_ends(shards: Path, tmp_path: Path) -> None:
    # Longer than a start takes on a machine that has more to do.
    config = write_config(tmp_path / "tiny.yaml", tiny_config(shards), hang_timeout_s=20.0, total_images=3200)
    run = tmp_path / "run"
    process = sret_scale("train", config, "--run", run, cwd=tmp_path)
    wait_for_images(run, 64, process)
    ranks = rank_processes(process)
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.suspend()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "rank 1 on " in error.strip().splitlines()[-1] and "has been stopped or lost" in error
    assert "optimizer_step" in (run / "logs" / "stacks-00000.txt").read_text()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE] == []


def test_losses_that_are_not_numbers_end_the_run_and_are_in_no_saved_weights(shards: Path, tmp_path: Path) -> None:
    config = tiny_config(shards)
    config = replace(config, optim=replace(config.optim, learning_rate=9e18, warmup_images=0))
    file = write_config(tmp_path / "tiny.yaml", config)
    ended = sret_scale_forked("train", file, "--run", tmp_path / "run", cwd=tmp_path)
    assert ended.returncode == 1
    reason = (
        r"(the loss of rank \d is (nan|inf)|the gradient of the class).* at \d+ samples seen, and \d+ updates in a row"
    )
    assert re.search(reason, ended.stderr.strip().splitlines()[-1])
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        assert all(value.isfinite().all() for value in load_file(checkpoint / "weights.safetensors").values())


def test_evaluate_repeats_the_number_of_the_run(untouched: Path) -> None:
    logged = {
        line["weights"]: line["top1"] for line in complete_lines(untouched / "metrics.jsonl") if line["kind"] == "eval"
    }
    for weights, top1 in logged.items():
        ended = sret_scale_forked("evaluate", untouched, "--weights", str(weights), "--json", cwd=untouched)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["top1"] == pytest.approx(top1, abs=1e-9)
    process = sret_scale("evaluate", untouched, "--ranks", "2", "--json", cwd=untouched)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert json.loads(out)["top1"] == pytest.approx(logged["ema"], abs=1e-9)
    assert json.loads(out)["num_samples"] == NUM_IMAGES


def test_an_unfinished_teacher_is_refused(untouched: Path, shards: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(untouched, teacher)
    (teacher / "status.json").write_text('{"state": "stopped", "exit_code": 85}')
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    ended = sret_scale_forked("train", tiny, f"distill.teacher=run:{teacher}", cwd=tmp_path)
    assert ended.returncode == 2 and "expected a finished run, got state 'stopped'" in ended.stderr


def test_another_teacher_than_that_of_the_interrupted_run_is_refused(
    untouched: Path, shards: Path, tmp_path: Path
) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(untouched, teacher)
    config = tiny_config(shards)
    config = replace(config, distill=replace(config.distill, teacher=f"run:{teacher}"))
    tiny = write_config(tmp_path / "tiny.yaml", config, total_images=96)
    assert sret_scale_forked("train", tiny, "--run", run, cwd=tmp_path).returncode == 0
    (run / "status.json").unlink()
    shutil.rmtree(list_checkpoints(teacher / "checkpoints")[0])
    ended = sret_scale_forked("train", tiny, "--run", run, cwd=tmp_path)
    assert ended.returncode == 2 and "learned from another teacher" in ended.stderr.strip().splitlines()[-1]


def test_what_decides_no_result_may_change_when_a_run_continues(untouched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    (run / "status.json").unlink()
    shutil.rmtree(list_checkpoints(run / "checkpoints")[0])
    changed = ["memory.schedule=none", "train.hang_timeout_s=99"]
    ended = sret_scale_forked("train", run / "config.yaml", *changed, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "continues with memory.schedule: 'per_application' -> 'none'" in ended.stdout
    assert digest(run) == digest(untouched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sret_x"], "no recipe or model preset 'sret_x'"),
        (["sret_t", "optim.lr=1"], "unknown key 'optim.lr'"),
        (["missing.yaml"], "missing.yaml"),
        (["sret_t"], "shards/imagenet/train"),
        (["TINY", "data.train_folder=EMPTY"], "EMPTY"),
        (["TINY", "model.num_classes=7"], "have 10 classes, the model has 7"),
        (["TINY", "model.image_size=40"], "groups"),
        (["TINY", "train.global_batch_size=33"], "is not a multiple of train.micro_batch_size"),
        (["TINY", "train.global_batch_size=2048", "train.micro_batch_size=1024"], "fewer than one global batch"),
        (["TINY", "train.total_images=8"], "less than one global batch"),
        (["TINY", "engine.ds_config=zero9"], "zero9"),
        (["TINY", "distill.teacher=run:nowhere"], "nowhere is not a run folder"),
        (["TINY", "distill.teacher=tim:resnet50"], "tim"),
        (["TINY", "--hostfile", "missing_hosts"], "missing_hosts"),
        (["TINY", "--run", "/proc/no"], "cannot make the run folder /proc/no"),
        (["TINY", "optim.warmup_images=512"], "optim.warmup_images=512 leaves nothing"),
        (["TINY", "--fresh", "--run", "."], "is not a run folder"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_starts(
    shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    (tmp_path / "EMPTY").mkdir()
    ended = sret_scale_forked("train", *(tiny if word == "TINY" else word for word in arguments), cwd=tmp_path)
    check_refused(ended.returncode, ended.stderr, message)
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_clear_line_of_the_process_that_a_user_starts(shards: Path, tmp_path: Path) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    process = sret_scale("train", tiny, "engine.ds_config=zero9", cwd=tmp_path)
    out, error = process.communicate(timeout=240)
    check_refused(process.returncode, error, "zero9")
    assert out == "" and not (tmp_path / "runs").exists()


def check_refused(status: int, error: str, message: str) -> None:
    assert status == 2, error
    assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) <= 2
    assert "Traceback" not in error


def damaged_shards(shards: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the shards, and the first tar of its training set."""
    shutil.copytree(shards, folder)
    return folder, min((folder / "train").glob("*.tar"))


def test_a_truncated_tar_is_named_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    copy, tar = damaged_shards(shards, tmp_path / "shards")
    tar.write_bytes(tar.read_bytes()[:-2048])
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(copy))
    ended = sret_scale_forked("train", tiny, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and tar.name in ended.stderr and not (tmp_path / "runs").exists()


def test_a_broken_image_is_replaced_counted_and_above_the_share_ends_the_run(shards: Path, tmp_path: Path) -> None:
    copy, tar = damaged_shards(shards, tmp_path / "shards")
    broken = open_shards(copy / "train")
    content = bytearray(tar.read_bytes())
    content[int(broken.offset[0]) + 60] ^= 0xFF
    tar.write_bytes(content)
    config = replace(tiny_config(copy), data=replace(tiny_config(copy).data, max_bad_rate=0.5))
    allowed = write_config(tmp_path / "allowed.yaml", config, total_images=128)
    assert sret_scale_forked("train", allowed, cwd=tmp_path).returncode == 0
    quarantine = complete_lines(tmp_path / "runs" / "allowed" / "quarantine.jsonl")
    assert {line["shard"] for line in quarantine} == {tar.name} and {line["key"] for line in quarantine} == {
        broken.key(0)
    }
    refused = write_config(tmp_path / "refused.yaml", tiny_config(copy), total_images=128)
    ended = sret_scale_forked("train", refused, cwd=tmp_path)
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert tar.name in last and "max_bad_rate" in last


def test_a_run_of_another_configuration_is_refused(untouched: Path) -> None:
    ended = sret_scale_forked("train", untouched / "config.yaml", "train.seed=3", "--run", untouched, cwd=untouched)
    assert ended.returncode == 2
    assert "train.seed: 0 -> 3" in ended.stderr and "--fresh" in ended.stderr


def test_dry_run_prints_command_and_configuration_and_starts_nothing(shards: Path, tmp_path: Path) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    ended = sret_scale_forked("train", tiny, "--dry-run", "train.seed=11", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    out = ended.stdout
    assert "deepspeed.launcher.launch" in out and "seed: 11" in out
    assert re.search(r"^memory of a rank: .*weights .*optimizer .*activations .*per_application$", out, re.MULTILINE)
    # 128 images in shards of 50; a step of 32 in a random order touches all three of them.
    assert "localhost: reads 3 of 3 shards in the first epoch, 3 in the first step" in out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_secret_of_the_environment_reaches_no_log_checkpoint_or_report(untouched: Path, tmp_path: Path) -> None:
    assert main(["report", str(untouched), "-o", str(tmp_path / "report.html")]) == 0
    files = [file for folder in (untouched, tmp_path) for file in folder.rglob("*") if file.is_file()]
    assert {"rank-00001.log", "environment.json", "weights.safetensors", "report.html"} <= {file.name for file in files}
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []
