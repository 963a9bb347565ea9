"""The report in a real browser (Debian's chromium, headless): silent console, no request, no sideways scrolling."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from sret_scale.lab.report import write_report
from tests.report_runs import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
QUIET += ("--no-first-run", "--disable-sync", "--disable-default-apps", "--hide-scrollbars", "--disable-dev-shm-usage")
# Measures the page in frames of both widths, where a browser's own smallest window plays no part.
PROBE = """<!doctype html><body style="margin:0"><script>
const widths = [400, 1400], found = {};
let open = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const charts = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width);
    found[width] = {scroll: root.scrollWidth, charts: charts.length, narrowest: Math.min(...charts),
                    widest: Math.max(...charts), size: getComputedStyle(page.body).fontSize};
    if (--open === 0) document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
  };
  frame.src = "/report.html";
  document.body.append(frame);
}
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt install chromium")


def _chromium(profile: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and notes what was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_arguments: object) -> None:
        return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.html of three runs, with telemetry, and the page that measures it."""
    folder = tmp_path_factory.mktemp("browser")
    for loops in (1, 2, 4):
        write_run(folder / "runs" / f"loops-{loops}", num_loops=loops, images=3200, has_telemetry=loops == 4)
    write_report([folder / "runs"], folder / "report.html")
    (folder / "probe.html").write_text(PROBE)
    return folder


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    _Server.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_fits_phone_and_desk_and_asks_for_nothing_else(folder: Path, address: str, tmp_path: Path) -> None:
    # Every other host name resolves to nothing: a request would be an error on the console.
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    ran = _chromium(tmp_path, offline, "--dump-dom", "--virtual-time-budget=10000", f"{address}/probe.html")
    match = re.search(r'<pre id="found">({"400".*?)</pre>', ran.stdout)
    assert match, ran.stdout[-500:] + ran.stderr[-2000:]
    found = json.loads(match[1])
    assert {width: found[width]["scroll"] for width in found} == {"400": 400, "1400": 1400}
    assert found["400"]["charts"] == found["1400"]["charts"] >= 12
    assert found["400"]["narrowest"] >= 300 and found["400"]["widest"] <= 400
    assert found["1400"]["narrowest"] >= 350 and found["1400"]["widest"] <= 700
    assert "CONSOLE" not in ran.stderr, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert set(_Server.asked) <= {"/probe.html", "/report.html", "/favicon.ico"}


def test_the_page_opens_from_disk_and_draws(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    address = (folder / "report.html").as_uri()
    ran = _chromium(tmp_path / "profile", f"--screenshot={picture}", "--window-size=1400,1800", address)
    assert "CONSOLE" not in ran.stderr
    with Image.open(picture) as image:
        assert image.size == (1400, 1800) and len(image.convert("RGB").getcolors(1 << 24) or []) > 200
