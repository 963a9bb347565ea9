"""Shards from servers that other people wrote: nginx with faults put in between, S3 and GCS servers from PyPI; and from
a hub as huggingface_hub asks for it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.remote.shard_sets import open_data
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import LoaderState, TrainLoader
from data_pipelines.stream.reader import ShardReader
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.servers.hub_server import serve_hub

pytestmark = pytest.mark.multi_process

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_pipelines" / "sample" / "fashion_mnist"
STALL_S = 2.0


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    target = tmp_path_factory.mktemp("fashion")
    write_shards(WriteConfig(kind="idx", source=SAMPLE, split="test", shard_samples=400), target, num_workers=1)
    return open_shards(target)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: "subprocess.Popen[str]") -> None:
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@pytest.fixture(scope="module")
def nginx(local: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of nginx that serves the shards."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    root, port = tmp_path_factory.mktemp("nginx"), _free_port()
    temporary = "".join(
        f"{name}_temp_path {root}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (root / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {root}/pid; error_log {root}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ root {local.folder}; }} }} }}\n"
    )
    command = [program, "-p", str(root), "-e", f"{root}/error.log", "-c", f"{root}/nginx.conf"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on, but does to those for the faulty file what the next fault says."""

    upstream: str
    faults: list[str]

    def do_HEAD(self) -> None:
        self._pass_on("HEAD")

    def do_GET(self) -> None:
        self._pass_on("GET")

    def _pass_on(self, method: str) -> None:
        fault = self.faults.pop(0) if self.faults and self.path.endswith(".tar") and method == "GET" else None
        if fault == "reset":
            self.connection.close()
            return
        if fault == "stall":
            time.sleep(STALL_S)
            return
        if fault == "error":
            self.send_error(500)
            return
        headers = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        request = urllib.request.Request(self.upstream + self.path, headers=headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=10)
        except HTTPError as error:
            self.send_error(error.code)
            return
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Length", "Content-Range", "Accept-Ranges", "ETag"):
                if answer.headers[name]:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "short" else body)
        self.close_connection = fault == "short"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass


@pytest.fixture
def proxy(nginx: str) -> Iterator[tuple[str, list[str]]]:
    """The URL of a proxy before nginx, and the faults that its next answers with shards have."""
    faults: list[str] = []
    handler = type("Handler", (_Proxy,), {"upstream": nginx, "faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", faults
    server.shutdown()
    thread.join()
    server.server_close()


def _config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        crop="padded", eval_crop_rate=1.0, cache_folder=str(tmp_path / "cache"), stall_s=0.5, fetch_attempts=4
    )


def _assert_same_as_local(url: str, local: ShardSet, config: DataConfig) -> None:
    shards = open_data(url, config)
    loaders = [
        TrainLoader(part, config, image_size=28, seed=0, rank=0, world_size=1, micro_batch_size=50, grad_accum_steps=1)
        for part in (shards, local)
    ]
    steps = [loader.steps(LoaderState()) for loader in loaders]
    for got, expected in islice(zip(*steps, strict=True), 8):
        assert torch.equal(got.micro_batches[0].images, expected.micro_batches[0].images)
    for iterator in steps:
        iterator.close()
    ranges = open_data(url, replace(config, remote_reads="ranges"))
    with ShardReader(ranges) as remote, ShardReader(local) as reader:
        for index in range(390, 410):
            assert remote.read(index) == reader.read(index)


def test_nginx_gives_the_batches_of_the_disk(nginx: str, local: ShardSet, tmp_path: Path) -> None:
    _assert_same_as_local(nginx, local, _config(tmp_path))


def test_faults_before_nginx_are_survived_and_named(
    proxy: tuple[str, list[str]], local: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, faults = proxy
    faults += ["error", "reset", "reset", "short", "stall", "error"]
    _assert_same_as_local(url, local, _config(tmp_path))
    assert not faults
    for reason in ("500", "short|Payload|payload", "Timeout"):
        assert re.search(rf"attempt \d of 4: {url}/shard-\d+\.tar: .*({reason})", caplog.text), reason


@pytest.mark.slow
def test_an_s3_server_gives_the_batches_of_the_disk(
    local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    port = _free_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_for(port, process)
            files = s3fs.S3FileSystem(skip_instance_cache=True)
            files.mkdir("bucket")
            for path in local.folder.iterdir():
                if path.is_file():
                    files.put_file(str(path), f"bucket/set/{path.name}")
            _assert_same_as_local("s3://bucket/set", local, replace(_config(tmp_path), stall_s=10.0))
            with pytest.raises(FileNotFoundError, match=r"s3://bucket/none/manifest\.json: not found"):
                open_data("s3://bucket/none", _config(tmp_path))
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_gcs_server_gives_the_batches_of_the_disk(
    local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    # The emulator has no gRPC, by which gcsfs would first ask for a minute what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    port = _free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    arguments = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "bucket"]
    command = [sys.executable, "-m", "gcp_storage_emulator", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            _wait_for(port, process)
            for path in local.folder.iterdir():
                if path.is_file():
                    query = f"uploadType=media&name=set/{path.name}"
                    url = f"http://127.0.0.1:{port}/upload/storage/v1/b/bucket/o?{query}"
                    with urllib.request.urlopen(urllib.request.Request(url, path.read_bytes())) as answer:
                        assert answer.status == 200
            _assert_same_as_local("gs://bucket/set", local, replace(_config(tmp_path), stall_s=10.0))
            with pytest.raises(FileNotFoundError, match=r"gs://bucket/none/manifest\.json: not found"):
                open_data("gs://bucket/none", _config(tmp_path))
        finally:
            process.terminate()


HUB_READER = """
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_pipelines.shards.index import open_shards
from data_pipelines.stream.reader import BadSampleError, ShardReader
from data_pipelines.remote.shard_sets import open_data
from tests.data.test_stream_servers import _config, _same_as_local

folder, work, what = sys.argv[1:]
url, config = "hf://datasets/someone/photos/set", _config(Path(work))
local = open_shards(folder)
if what == "batches":
    _assert_same_as_local(url, local, config)
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/someone/photos/none/manifest\\.json: not found"):
        open_data("hf://datasets/someone/photos/none", config)
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/someone/other/set/manifest\\.json: not found"):
        open_data("hf://datasets/someone/other/set", config)
else:
    for reads in ("shards", "ranges"):
        shards = open_data(url, replace(config, remote_reads=reads))
        with ShardReader(shards) as reader, pytest.raises(BadSampleError, match=r"not found"):
            reader.read(450)
"""


@pytest.mark.slow
def test_a_hub_gives_the_batches_of_the_disk(local: ShardSet, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with serve_hub(local.folder, "someone/photos", "set") as hub:
        # The package reads the address when it is imported.
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}

        def read(what: str) -> None:
            command = [sys.executable, "-W", "ignore", "-c", HUB_READER, str(local.folder), str(tmp_path / what), what]
            result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr

        read("batches")
        # Shards are fetched once each, and a sample read by a range is that range and no more.
        for number, name in enumerate(local.shard_names):
            size = local.manifest.shards[number].bytes
            assert hub.requests.count((name, f"bytes=0-{size - 1}")) == 1
        ranges = [asked for name, asked in hub.requests if name.endswith(".tar")][-20:]
        lengths = [int(end) - int(start) + 1 for start, end in (asked[6:].split("-") for asked in ranges)]
        assert lengths == local.length[390:410].tolist()
        hub.gone.add(local.shard_names[1])
        read("gone")
