"""Proxies and redirects of servers: the environment's proxy is used, and no server leads a read to a private place."""

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp.connector
import pytest
import yarl

from data_pipelines.remote import http_files
from data_pipelines.remote.cache import UnavailableError
from data_pipelines.remote.fetch import RemoteFolder
from data_pipelines.remote.http_files import PublicResolver, RedirectError, is_public, redirected

pytestmark = pytest.mark.multi_process

Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]


@contextmanager
def _server(answer: Answer, certificate: Path | None = None) -> Iterator[tuple[str, list[BaseHTTPRequestHandler]]]:
    """(origin, requests so far) of a server on loopback, over TLS where a certificate is given."""
    requests: list[BaseHTTPRequestHandler] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self)
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _file(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, b"content"


def _to(location: str) -> Answer:
    return lambda handler: (302, {"Location": location, "Set-Cookie": "session=secret"}, b"")


def _read(url: str) -> bytes:
    return RemoteFolder(url, stall_s=5.0, attempts=1).read_whole("f", 100)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_proxy_of_the_environment_is_used_but_where_no_proxy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with _server(_file) as (proxy, requests):
        monkeypatch.setenv("http_proxy", proxy)
        assert _read("http://shards.invalid/set") == b"content"
        assert [request.path for request in requests] == ["http://shards.invalid/set/f"]
        monkeypatch.setenv("no_proxy", "shards.invalid")
        with pytest.raises(UnavailableError, match=r"shards\.invalid"):
            _read("http://shards.invalid/set")
        assert len(requests) == 1


def test_a_redirect_inside_one_origin_is_followed() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        return (302, {"Location": "/g?token=x"}, b"") if handler.path == "/f" else _file(handler)

    with _server(answer) as (url, requests):
        assert _read(url) == b"content"
        assert [request.path for request in requests] == ["/f", "/g?token=x"]
    with _server(_to("/f")) as (url, requests), pytest.raises(UnavailableError, match="more than 5 redirects"):
        _read(url)


def test_a_redirect_elsewhere_over_http_is_refused_before_it_is_asked() -> None:
    with _server(_file) as (target, asked), _server(_to(f"{target}/latest/meta-data")) as (url, _):
        with pytest.raises(UnavailableError, match="only https redirects to https elsewhere are followed"):
            _read(url)
        assert not asked


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    try:
        subprocess.run([*command, *names, "-keyout", path, "-out", f"{path}.crt"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_over_https_goes_to_public_addresses_only_and_without_credentials(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    context = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", context)
    with _server(_file, certificate) as (target, asked):
        there = target.replace("127.0.0.1", f"user:word@{host}")
        with _server(_to(f"{there}/f"), certificate) as (url, first):
            mine = url.replace("https://", "https://me:secret@")
            with pytest.raises(UnavailableError, match="private or loopback address"):
                _read(mine)
            assert not asked and first[0].headers["Authorization"]
            # Loopback stands for the internet now, which no file or server can bring about.
            monkeypatch.setattr(http_files, "is_public", lambda address: bool(address))
            assert _read(mine) == b"content"
            assert asked[0].headers["Authorization"] is None and asked[0].headers["Cookie"] is None


@pytest.mark.parametrize(
    "location",
    [
        "http://example.org/f",
        "https://127.0.0.1/f",
        "https://10.1.2.3/f",
        "https://192.168.0.1/f",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/f",
        "https://0.0.0.0/f",
        "https://[::1]/f",
        "https://[fe80::1]/f",
        "https://[fd00::1]/f",
        "https://[::ffff:127.0.0.1]/f",
        "file:///etc/passwd",
        "//10.0.0.1/f",
        "https://[bad/f",
    ],
)
def test_redirects_that_are_never_followed(location: str) -> None:
    with pytest.raises(RedirectError):
        redirected(yarl.URL("https://me:secret@data.example/set/f"), location)


def test_redirects_that_are_followed() -> None:
    url = yarl.URL("https://me:secret@data.example/set/f")
    assert str(redirected(url, "https://a:b@cdn.example/f?sig=1")) == "https://cdn.example/f?sig=1"
    assert redirected(url, "g").path == "/set/g"
    assert is_public("1.1.1.1") and is_public("2606:4700::1111") and not is_public("224.0.0.1")


def test_a_name_of_a_private_address_is_refused_when_it_is_resolved() -> None:
    async def resolve() -> None:
        await PublicResolver().resolve("localhost", 443)

    with pytest.raises(RedirectError, match="localhost, which is the private or loopback address"):
        asyncio.run(resolve())


def test_an_answer_without_an_end_is_read_to_its_bound_only() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Length": str(1 << 50)}, b"x" * (1 << 20)

    with _server(endless) as (url, _), pytest.raises(ValueError, match="more than the 100 bytes"):
        _read(url)
