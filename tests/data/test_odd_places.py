"""Places that are no plain files or folders: pipes, other users' caches, file systems without locks or flushes."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.atomic_files import write_whole
from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import cache_of, open_data
from data_pipelines.shards.index import open_shards
from data_pipelines.stream.reader import BadSampleError, ShardReader
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from sret_scale.runs.run_folder import RunFolder
from tests.data.shard_sources import make_tree

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample" / "fashion_mnist"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "test"
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=700), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


def _instead(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


# Which file of the set is none, and the command that meets it.
COMMANDS = [
    *((name, ["info", "SET"]) for name in ("manifest.json", "index.npz", "shard-000001.tar")),
    ("shard-000001.tar", ["verify", "SET", "--workers", "1"]),
    ("shard-000001.tar", ["sidecars", "SET"]),
    ("shard-000001.tar", ["head", "SET", "OUT.png"]),
    ("shard-000001.tar", ["repair", "SET", "OUT", "--workers", "1"]),
    ("shard-000001.tar", ["write", "tars", "SET", "OUT", "--workers", "1"]),
    ("t10k-images-idx3-ubyte.gz", ["write", "idx", "IDX", "OUT", "--split", "test"]),
    ("t10k-labels-idx1-ubyte.gz", ["write", "idx", "IDX", "OUT", "--split", "test"]),
    ("classes.txt", ["write", "idx", "IDX", "OUT", "--split", "test"]),
    ("ILSVRC2012_img_val.tar", ["write", "ilsvrc", "EMPTY", "OUT", "--split", "val"]),
    ("test-0.parquet", ["write", "parquet", "EMPTY", "OUT", "--split", "test"]),
    ("a.tar", ["index", "EMPTY", "--workers", "1"]),
]


@pytest.mark.lengthy
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda value: str(value)[:40])
def test_a_pipe_or_device_where_a_file_is_expected_is_an_error(
    folder: Path, tmp_path: Path, name: str, command: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SAMPLE, tmp_path / "idx")
    (tmp_path / "empty").mkdir()
    places = {"SET": folder, "IDX": tmp_path / "idx", "EMPTY": tmp_path / "empty"}
    used = next(places[word] for word in command if word in places)
    _instead(used / name, kind)
    arguments = [str(places.get(word, tmp_path / word.lower() if word.startswith("OUT") else word)) for word in command]
    status = main(["shards", *arguments])
    output = "".join(capsys.readouterr())
    assert status != 0 and name in output and "Traceback" not in output


@pytest.mark.timeout(60)
def test_a_pipe_among_images_is_an_error_with_its_name(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2)
    place = next(path for path in sorted(tree.iterdir()) if path.is_dir()) / "pipe.jpg"
    os.mkfifo(place)
    with pytest.raises(ValueError, match=r"pipe\.jpg: expected a regular file"):
        write_shards(WriteConfig(kind="folder", source=tree), tmp_path / "out")


@pytest.mark.timeout(60)
def test_a_shard_that_becomes_a_pipe_is_bad_samples(folder: Path) -> None:
    shards = open_shards(folder)
    _instead(folder / shards.shard_names[0], "pipe")
    with ShardReader(shards) as reader, pytest.raises(BadSampleError):
        reader.read(0)


def _as(user: int, do: Callable[[], None]) -> int:
    """The exit status of a child that does it as another user."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            do()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_of_a_cache_have_a_folder_each(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    for path in (*tmp_path.parents, tmp_path):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)

    def lease() -> None:
        held = cache_of(open_data(f"file://{folder}", DataConfig(cache_folder=str(cache))))
        assert held is not None
        with held.lease(0) as path:
            assert path.stat().st_uid == os.geteuid()

    assert [_as(user, lease) for user in (2001, 2002, 2001, 2002)] == [0, 0, 0, 0]
    assert len(list(cache.iterdir())) == 2


def test_a_cache_of_somebody_else_is_refused_with_a_way_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"chmod 1777 it, or set data\.cache_folder"):
        open_data(f"file://{folder}", DataConfig(cache_folder=str(tmp_path / "cache")))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_folders_that_cannot_be_flushed_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.fsync

    def flush(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(OSError, match="bad"):
        write_whole(tmp_path / "file", "other")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)

    def lease() -> None:
        held = cache_of(open_data(f"file://{folder}", DataConfig(cache_folder=str(tmp_path / "cache"))))
        assert held is not None
        with held.lease(0):
            pass

    def hold() -> None:
        with RunFolder(tmp_path).locked():
            pass

    def write() -> None:
        write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test"), tmp_path / "out")

    for use in (lease, hold, write):
        with pytest.raises(OSError, match=r"no file locks \(flock\).* choose a folder elsewhere"):
            use()
