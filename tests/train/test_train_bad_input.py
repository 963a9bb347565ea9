"""What a user, a disk or a broken file can do to `train`, `evaluate` and their kin: one clear line, nothing lost."""

import hashlib
import json
import resource
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shards.index import open_shards, render_index
from data_pipelines.shards.manifest import INDEX_NAME, MANIFEST_NAME, read_manifest, render_manifest
from data_pipelines.shards.npz_columns import parse_columns
from sret_scale.cli import main
from sret_scale.runs.checkpoint import list_checkpoints
from tests.forked import sret_scale_forked
from tests.runs import digest
from tests.tiny import sret_scale, tiny_config, tiny_idx, tiny_shards, write_config

pytestmark = pytest.mark.multi_process

Fail = Callable[..., str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one rank and four steps, with checkpoints after the third and the last."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "tiny.yaml", tiny_config(shards), total_images=128)
    ended = sret_scale_forked("train", config, "--run", folder / "run", "--ranks", "1", cwd=folder)
    assert ended.returncode == 0, ended
    return folder / "run"


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Runs a command that must fail, in this process and an empty folder; returns its only line on stderr."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        status = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert status == 2, error
        return check_one_line(error)

    return run


def check_one_line(error: str) -> str:
    """`error`, after checking that it is one message of a line or two, without a traceback."""
    assert error.startswith("error: ") and len(error.strip().splitlines()) <= 2, error
    assert "Traceback" not in error
    return error


def copied(run: Path, folder: Path, *, is_finished: bool = True) -> Path:
    shutil.copytree(run, folder)
    if not is_finished:
        (folder / "status.json").unlink()
    return folder


# Labels, ranks, folders, hosts ------------------------------------------------------------------------------------


def test_a_label_outside_the_classes_is_refused_when_shards_are_written(fail: Fail, tmp_path: Path) -> None:
    source = tiny_idx(tmp_path / "idx")
    labels = source / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[8 + 17] = 10
    labels.write_bytes(content)
    error = fail("shards", "write", "idx", source, tmp_path / "out", "--split", "train", "--workers", 1)
    assert "label 10 of image 17 is outside the 10 classes" in error and str(labels) in error
    assert "correct the labels" in error and not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_label_outside_the_classes_in_an_index_is_refused(fail: Fail, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    write_label(copy / "train", 3, 10)
    error = fail("train", write_config(tmp_path / "tiny.yaml", tiny_config(copy)))
    assert str(copy / "train" / INDEX_NAME) in error and "label 10" in error and "the 10 classes" in error
    assert "write the shards again" in error
    assert not (tmp_path / "runs").exists()


def write_label(folder: Path, index: int, label: int) -> None:
    """Change a label of a shard set and everything that proves the index, as a faulty writer would have made it."""
    columns = {name: np.array(column) for name, column in parse_columns((folder / INDEX_NAME).read_bytes()).items()}
    columns["label"][index] = label
    data = render_index(columns)
    manifest = replace(read_manifest(folder), index_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest())
    (folder / INDEX_NAME).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(render_manifest(manifest))


def test_more_ranks_than_samples_are_refused(fail: Fail, shards: Path, tmp_path: Path) -> None:
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    error = fail("train", tiny, "--ranks", 200, "train.micro_batch_size=1", "train.global_batch_size=200")
    assert "has 128 samples" in error and "200 for 200 ranks" in error and "use fewer ranks" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["missing", "empty"])
@pytest.mark.parametrize("command", ["train", "evaluate", "shards"])
def test_a_missing_or_empty_shard_folder_says_what_to_run(
    fail: Fail, shards: Path, trained: Path, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    error = {
        "train": lambda: fail("train", tiny, f"data.train_folder={name}"),
        "evaluate": lambda: fail("evaluate", trained, "--shards", name),
        "shards": lambda: fail("shards", "verify", name),
    }[command]()
    # A run knows its folders by whole paths, the other commands as they were typed.
    place = tmp_path / name if command == "train" else name
    assert error.startswith(f"error: {place}: no ") and "sret-scale shards write" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "hosts",
    ["no-such-host.invalid slots=1\n", f"{socket.gethostname()} slots=1\nno-such-host.invalid slots=1\n"],
)
def test_an_unreachable_host_is_named_and_blocks_no_corrected_command(
    fail: Fail, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    # With the address given, the second case gets as far as ssh.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    (tmp_path / "hosts").write_text(hosts)
    tiny = write_config(tmp_path / "tiny.yaml", tiny_config(shards))
    error = fail("train", tiny, "--hostfile", tmp_path / "hosts", "--run", tmp_path / "run")
    assert "host no-such-host.invalid" in error and "check its name" in error
    left = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {"lock", "launch.lock"}


# Folders that cannot be written, and --debug ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (("report", "TRAINED", "-o", "/proc/x/report.html"), "choose another page with -o"),
        (("demo", "--output", "/proc/x"), "choose another --output"),
        (("train", "TINY", "--run", "/proc/x"), "choose another --run"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_with_the_flag_to_change(
    fail: Fail, shards: Path, trained: Path, tmp_path: Path, command: tuple[str, ...], advice: str
) -> None:
    places = {"TRAINED": trained, "TINY": write_config(tmp_path / "tiny.yaml", tiny_config(shards))}
    error = fail(*(places.get(word, word) for word in command))
    assert "/proc/x" in error and advice in error


def test_debug_shows_the_traceback(shards: Path, tmp_path: Path, fail: Fail) -> None:
    # In a process of its own: what Python prints of an error that nobody caught is what a user sees.
    process = sret_scale("shards", "verify", tmp_path / "missing", cwd=tmp_path)
    check_one_line(process.communicate(timeout=60)[1])
    assert process.returncode == 2
    process = sret_scale("evaluate", tmp_path / "missing", "--debug", cwd=tmp_path)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and error.startswith("Traceback")
    assert "is not a run folder" in error.strip().splitlines()[-1]


# Broken images and checkpoints of another model -------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(content)


def test_a_flipped_bit_is_named_in_evaluate(fail: Fail, shards: Path, trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards / "test", tmp_path / "test"))
    whole = open_shards(copy)
    tar = copy / whole.shard_names[int(whole.shard_of[70])]
    flip(tar, int(whole.offset[70]) + 300)
    error = fail("evaluate", trained, "--shards", copy)
    assert str(tar) in error and repr(whole.key(70)) in error and "checksum" in error.lower()


def undecodable(shards: Path, folder: Path, index: int) -> tuple[Path, str]:
    """A copy of a shard set with an image whose checksums are right and whose content is no image: (tar, key)."""
    whole = open_shards(shards)
    shutil.copytree(shards, folder)
    tar = folder / whole.shard_names[int(whole.shard_of[index])]
    start = int(whole.offset[index])
    content = bytearray(tar.read_bytes())
    image = content[start : start + int(whole.length[index])]
    # The zlib header inside the first IDAT chunk, behind signature, IHDR and the chunk's length and name.
    assert image[37:41] == b"IDAT"
    size = int.from_bytes(image[33:37], "big")
    image[41:43] = b"\0\0"
    image[41 + size : 45 + size] = zlib.crc32(image[37 : 41 + size]).to_bytes(4, "big")
    content[start : start + len(image)] = image
    tar.write_bytes(content)
    (folder / MANIFEST_NAME).unlink()
    (folder / INDEX_NAME).unlink()
    (folder / "classes.txt").write_text("\n".join(whole.class_names))
    assert main(["shards", "index", str(folder)]) == 0
    return tar, whole.key(index)


def test_an_image_that_does_not_decode_is_named_in_evaluate(
    fail: Fail, shards: Path, trained: Path, tmp_path: Path
) -> None:
    tar, key = undecodable(shards / "test", tmp_path / "test", 70)
    error = fail("evaluate", trained, "--shards", tmp_path / "test")
    assert str(tar) in error and repr(key) in error


def test_an_image_that_does_not_decode_is_named_in_train(shards: Path, tmp_path: Path) -> None:
    tar, key = undecodable(shards / "train", tmp_path / "train", 70)
    config = tiny_config(shards)
    config = replace(config, data=replace(config.data, train_folder=str(tmp_path / "train")))
    tiny = write_config(tmp_path / "tiny.yaml", config, total_images=128)
    ended = sret_scale_forked("train", tiny, "--ranks", "1", cwd=tmp_path)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2, ended
    assert last.startswith("error: ") and str(tar) in last and repr(key) in last and "data.max_bad_rate" in last
    (bad,) = (tmp_path / "runs" / "tiny" / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(bad)["shard"], json.loads(bad)["key"]) == (tar.name, key)


def test_a_checkpoint_of_another_architecture_is_refused_in_evaluate(fail: Fail, trained: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("num_loops: 3", "num_loops: 4"))
    error = fail("evaluate", run)
    newest = list_checkpoints(run / "checkpoints")[0]
    assert f"{newest} was made by another architecture: stages.0.num_loops: 3 -> 4" in error
    assert "the configuration of the checkpoint" in error


# A full disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint_to_continue_from(
    trained: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path / "run", is_finished=False)
    newest, previous = list_checkpoints(run / "checkpoints")
    shutil.rmtree(newest)
    command = ("train", run / "config.yaml", "--ranks", "1")
    process = sret_scale(*command, cwd=tmp_path)
    # Set before the process starts others, which inherit it. Files of logs and metrics are smaller, weights larger.
    limit = (previous / "weights.safetensors").stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, error = process.communicate(timeout=120)
    last = error.strip().splitlines()[-1]
    assert process.returncode not in (0, 85), error
    assert last.startswith("error: ") and f"cannot save checkpoint {newest}" in last and "bytes of tensors" in last
    assert "run the same command again" in last
    assert list_checkpoints(run / "checkpoints") == [previous]
    assert main(["checkpoint", "verify", str(run)]) == 0
    ended = sret_scale_forked(*command, cwd=tmp_path)
    assert ended.returncode == 0, ended
    assert digest(run) == digest(trained)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
