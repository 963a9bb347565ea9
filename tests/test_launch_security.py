"""Nothing that a stranger writes becomes code or a command, and nothing secret leaves the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sret_scale.train.config import from_yaml
from sret_scale.train.node.hostfile import read_hostfile
from sret_scale.train.node.places import choose_nodes
from sret_scale.train.run_folder import environment

ROOT = Path(__file__).parents[1]
CANARY = "canary-4f1d9a"
TOY = """
import sys
from pathlib import Path
from sret_scale.train.launcher import launch
folder = Path(sys.argv[1])
sys.exit(launch(folder, folder / "config.yaml", num_ranks=1, module="tests.toy_rank", dry_run=len(sys.argv) > 2))
"""


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


def test_secret_of_the_environment_reaches_no_file_and_no_output(tmp_path: Path) -> None:
    folder = tmp_path / "run"
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


def test_run_name_with_a_command_in_it_is_only_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "$(touch evil); `touch evil` -rf"
    folder.mkdir()
    (folder / "config.yaml").write_text("finish")
    command = [sys.executable, "-c", TOY, str(folder)]
    environment_ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment_, check=True, capture_output=True, cwd=tmp_path)
    assert (folder / "status.json").exists()
    assert not list(tmp_path.rglob("evil"))
