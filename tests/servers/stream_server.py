"""A web server on loopback that serves ranges of files, and does what servers do wrong when told to."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL_S = 3.0


class Site:
    """`faults[name]`: what the next requests for it meet, of error, reset, short, stall, missing; then all is well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.url = ""

    def next_fault(self, name: str) -> str | None:
        self.requests.append(name)
        faults = self.faults.get(name)
        return faults.pop(0) if faults else None


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name = self.path.lstrip("/")
        fault = self.site.next_fault(name)
        path = self.site.folder / name
        if fault == "reset":
            self.connection.close()
            return
        if fault == "stall":
            time.sleep(STALL_S)
            return
        if fault == "error":
            self.send_error(500)
            return
        if fault == "missing" or not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200)
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data[: len(data) // 2] if fault == "short" else data)
        if fault == "short":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Site]:
    """Serves the files of `folder` until the `with` is left."""
    site = Site(folder)
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
