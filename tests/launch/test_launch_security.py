"""Nothing that a stranger writes becomes code or a command, and nothing secret leaves the environment."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.labels.records import parse_header
from data_pipelines.labels.store import open_labels
from data_pipelines.shards.index import open_shards
from data_pipelines.shards.tar_scan import TarError, scan_members
from data_pipelines.stream.loader import evaluation_batches
from sret_scale.cli import main
from sret_scale.config.run_config import from_yaml
from sret_scale.launch.hostfile import read_hostfile
from sret_scale.launch.nodes import choose_nodes
from sret_scale.runs.checkpoint import read_state, read_tensors
from sret_scale.runs.run_folder import environment

ROOT = Path(__file__).parents[2]
CANARY = "canary-4f1d9a"
TOY = """
import sys
from pathlib import Path
from sret_scale.launch.launcher import launch
folder = Path(sys.argv[1])
sys.exit(launch(folder, folder / "config.yaml", num_ranks=1, module="tests.ranks.toy_rank", dry_run=len(sys.argv) > 2))
"""


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_pickle_in_place_of_weights_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "evil")))
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        read_tensors(tmp_path, "weights")
    assert not (tmp_path / "evil").exists()
    # The bomb itself works.
    pickle.loads(file.read_bytes())  # noqa: S301
    assert (tmp_path / "evil").exists()


def read_label_header(file: Path) -> object:
    return parse_header(file.read_bytes(), file.stat().st_size)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.yaml", from_yaml),
        ("hosts", read_hostfile),
        ("manifest.json", lambda file: open_shards(file.parent)),
        ("plan.json", lambda file: open_labels(file.parent)),
        ("unit-00000.soft", read_label_header),
        ("state.json", lambda file: read_state(file.parent)),
    ],
)
def test_pickle_in_any_place_is_an_error_and_runs_nothing(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "evil")))
    with pytest.raises((ValueError, OSError)):
        read(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_pickled_members_of_a_foreign_shard_stay_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "png")
    folder = tmp_path / "set"
    folder.mkdir()
    bomb = pickle.dumps(Bomb(tmp_path / "evil"))
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for name, data in {"a.cls": b"0", "a.pkl": bomb, "a.png": image.getvalue(), "a.pth": bomb}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for action in (["index", str(folder)], ["verify", str(folder)]):
        assert main(["shards", *action]) == 0, capsys.readouterr().err
    shards = open_shards(folder)
    (batch,) = evaluation_batches(shards, DataConfig(), image_size=8, batch_size=1, rank=0, world_size=1)
    assert batch.images.shape == (1, 3, 8, 8) and not (tmp_path / "evil").exists()


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, target
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(bytes(10240)), "is gzip, not tar"),
        # 8 TiB that are not there: refused from the header, before any room is made for them.
        (tar_header("a.jpg", 1 << 43), "a member of 8,796,093,022,208 bytes, 0 are there"),
        (tar_header("x", 1 + (1 << 20), tarfile.XHDTYPE) + bytes(1 << 21), "an extended header of 1,048,577 bytes"),
        (tar_header("a.jpg", 0, tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (tar_header("a.jpg", 0, tarfile.CHRTYPE), "device or other special member"),
        (tar_header("../a.jpg", 0), "leads out of the folder"),
    ],
    # Names of their own: gzip writes the time, and two processes that share the tests must give them the same names.
    ids=["gzip", "size", "extended_header", "link", "device", "outside"],
)
def test_tar_that_lies_is_refused_from_its_header(data: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        list(scan_members(memoryview(data)))


@pytest.mark.parametrize(
    "text",
    [
        "train: !!python/object/apply:os.system ['touch evil']",
        "train: !!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', 'evil']]",
    ],
)
def test_yaml_tag_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"tag|python"):
        from_yaml(tmp_path / "config.yaml")
    assert not (tmp_path / "evil").exists()


@pytest.mark.multi_process
def test_secret_reaches_no_file_and_no_output_and_a_command_in_a_name_is_only_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "$(touch evil); `touch evil` -rf"
    folder.mkdir()
    (folder / "config.yaml").write_text("finish")
    secret = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    for arguments in ([str(folder), "dry"], [str(folder)]):
        result = subprocess.run(
            [sys.executable, "-c", TOY, *arguments],
            env=secret,
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        assert CANARY not in result.stdout + result.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert [path for path in files if CANARY in path.read_text(errors="replace")] == []
    assert (folder / "status.json").exists() and not list(tmp_path.rglob("evil"))


def test_saved_environment_and_remote_nodes_get_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\n")
    place = choose_nodes(hosts=read_hostfile(tmp_path / "hosts"))
    assert CANARY not in repr(place)
    assert CANARY not in json.dumps(environment(2))


@pytest.mark.parametrize("address", ["-x", "a b", "$(x)", "a;b"])
def test_master_address_of_the_environment_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\n")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        choose_nodes(hosts=read_hostfile(tmp_path / "hosts"))
