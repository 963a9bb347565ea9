"""The part of the Hugging Face hub that reading a dataset needs, on loopback, over a folder.

As on the hub, a file is resolved to an address on another host path by a redirect, and what is missing is said in a
header (`X-Error-Code`), which huggingface_hub turns into its errors.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


class Hub:
    """One dataset, `name`, with the files of `folder` under `prefix`. `requests` are the ranges and files asked for."""

    def __init__(self, folder: Path, name: str, prefix: str) -> None:
        self.folder, self.name, self.prefix = folder, name, prefix
        self.requests: list[tuple[str, str]] = []
        # Files that the listing has and that are gone when they are asked for.
        self.gone: set[str] = set()
        self.url = ""

    def entries(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return [
            {"type": "file", "path": f"{self.prefix}/{path.name}", "size": path.stat().st_size, "oid": f"{number:040x}"}
            for number, path in enumerate(files)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = set(json.loads(body)["paths"])
        self._send_json([entry for entry in self.hub.entries() if entry["path"] in wanted])

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if path == f"/api/datasets/{hub.name}/revision/main" or path == f"/api/datasets/{hub.name}":
            self._send_json({"id": hub.name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif path.startswith(f"/api/datasets/{hub.name}/tree/main"):
            folder = path.removeprefix(f"/api/datasets/{hub.name}/tree/main").strip("/")
            if folder == hub.prefix:
                self._send_json(hub.entries())
            else:
                self._refuse("EntryNotFound")
        elif match := re.fullmatch(rf"/datasets/{hub.name}/resolve/main/{hub.prefix}/(.+)", path):
            if match[1] in hub.gone or not (hub.folder / match[1]).exists():
                self._refuse("EntryNotFound")
                return
            self.send_response(302)
            self.send_header("Location", f"{hub.url}/storage/{match[1]}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith("/storage/"):
            self._send_file(path.removeprefix("/storage/"), with_body=with_body)
        else:
            self._refuse("RepoNotFound")

    def _send_file(self, name: str, *, with_body: bool) -> None:
        data = (self.hub.folder / name).read_bytes()
        asked = self.headers.get("Range", "")
        self.hub.requests.append((name, asked))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        self.send_response(206 if wanted else 200)
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _send_json(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass


@contextmanager
def serve_hub(folder: Path, name: str, prefix: str) -> Iterator[Hub]:
    """Serves the files of `folder` as the dataset `name` until the `with` is left."""
    hub = Hub(folder, name, prefix)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
