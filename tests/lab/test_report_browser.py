"""The report in a real browser (Debian's chromium, headless): silent console, no request; phone, desk, paper, dark."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from sret_scale.lab.report.page import write_report
from tests.lab.report_runs import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
    "--disable-default-apps",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)
# Measures the page in frames of both widths, where a browser's own smallest window plays no part, and with its rules
# for paper (A4 at 96 dots an inch) and for dark screens in force.
PROBE = """<!doctype html><body style="margin:0"><script>
const frames = [[400, ""], [1400, ""], [794, "print"], [1000, "dark"]], found = {};
let open = frames.length;
for (const [width, medium] of frames) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement, style = frame.contentWindow.getComputedStyle;
    for (const sheet of page.styleSheets)
      for (const rule of [...sheet.cssRules])
        if (medium && rule.media && rule.media.mediaText.includes(medium))
          for (const inner of rule.cssRules) sheet.insertRule(inner.cssText, sheet.cssRules.length);
    const charts = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width);
    found[width] = {scroll: root.scrollWidth, charts: charts.length, narrowest: Math.min(...charts),
                    widest: Math.max(...charts), paper: style(page.body).backgroundColor,
                    ink: style(page.body).color, links: style(page.querySelector("figcaption nav")).display,
                    unbroken: style(page.querySelector("figure")).breakInside,
                    asked: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)};
    if (--open === 0) document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
  };
  frame.src = "report.html";
  document.body.append(frame);
}
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt install chromium")


@pytest.mark.multi_process
def test_the_page_opens_from_disk_fits_every_medium_and_asks_for_nothing_else(tmp_path: Path) -> None:
    for loops in (1, 2, 4):
        write_run(tmp_path / "runs" / f"loops-{loops}", num_loops=loops, images=3200, has_telemetry=loops == 4)
    page = write_report([tmp_path / "runs"], tmp_path / "report.html").page
    (tmp_path / "probe.html").write_text(PROBE)
    picture = tmp_path / "page.png"
    # Every host name resolves to nothing: a request would be an error on the console. From disk, files beside the page
    # are strangers to each other unless this is said.
    flags = ["--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--virtual-time-budget=10000"]
    flags += ["--dump-dom", f"--screenshot={picture}", "--window-size=1400,1900", f"--user-data-dir={tmp_path}/profile"]
    command = [str(CHROMIUM), *QUIET, *flags, "--enable-logging=stderr", (tmp_path / "probe.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    match = re.search(r'<pre id="found">({"400".*?)</pre>', ran.stdout)
    assert match, ran.stdout[-500:] + ran.stderr[-2000:]
    found = json.loads(match[1])
    assert {width: found[width]["scroll"] for width in found} == {"400": 400, "1400": 1400, "794": 794, "1000": 1000}
    assert found["400"]["charts"] == found["1400"]["charts"] == page.read_text().count("<figure>") >= 12
    assert found["400"]["narrowest"] >= 300 and found["400"]["widest"] <= 400
    assert found["1400"]["narrowest"] >= 350 and found["1400"]["widest"] <= 700
    printed, dark, light = found["794"], found["1000"], found["1400"]
    assert (printed["paper"], printed["links"], printed["unbroken"]) == ("rgb(255, 255, 255)", "none", "avoid")
    assert 300 <= printed["narrowest"] <= printed["widest"] <= 397 and light["links"] == "block"
    brightness = [sum(map(int, re.findall(r"\d+", found[width][part])[:3])) for width in ("1400", "1000")
                  for part in ("paper", "ink")]  # fmt: skip
    assert brightness[0] > 600 > 150 > brightness[1] and brightness[2] < 150 < 600 < brightness[3]
    assert dark["charts"] == light["charts"]
    # A file that the page asks for is named there as well, found or not.
    assert all(found[width]["asked"] == [] for width in found)
    assert "CONSOLE" not in ran.stderr, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    with Image.open(picture) as image:
        assert image.size == (1400, 1900) and len(image.convert("RGB").getcolors(1 << 24) or []) > 200


SORTED = """<!doctype html><body style="margin:0"><iframe src="report.html" style="width:WIDTHpx;height:1700px;border:0"
onload="
  const page = this.contentDocument;
  const rows = () => [...page.querySelectorAll('.settings tbody tr')]
    .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
    .map(row => row.querySelector('[data-title=num_loops]').textContent);
  const found = {first: page.querySelector('figure svg').getBoundingClientRect().bottom, asis: rows()};
  page.querySelector('#up-0').click(); found.up = rows();
  page.querySelector('#down-0').click(); found.down = rows();
  const cells = [...page.querySelectorAll('.settings td')];
  found.clipped = cells.filter(one => one.scrollWidth > one.clientWidth + 1).length;
  const box = one => one.getBoundingClientRect(), figures = [...page.querySelectorAll('figure')];
  found.empty = Math.max(...figures.map(one => box(one).bottom - box(one.querySelector('nav')).bottom));
  page.querySelectorAll('details').forEach(one => one.open = true);
  const names = [...page.querySelectorAll('.summary .name')].map(name => name.getBoundingClientRect().height);
  found.names = Math.max(...names);
  document.body.insertAdjacentHTML('beforeend', '<pre id=found>' + JSON.stringify(found) + '</pre>');
"></iframe></body>"""


@pytest.mark.multi_process
@pytest.mark.parametrize("width", [390, 1280])
def test_settings_are_sorted_by_a_click_and_the_first_figure_is_near(tmp_path: Path, width: int) -> None:
    for loops, top1 in ((2, 0.7), (12, 0.8), (4, 0.6)):
        for seed in range(2):
            name = f"an_experiment_with_a_long_name_num_loops-{loops}_seed-{seed}"
            run = write_run(
                tmp_path / "runs" / name, num_loops=loops, seed=seed, images=1280, final_top1=top1, has_telemetry=True
            )
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(
                text.replace("branch_scheme: published", f"branch_scheme: scheme_of_{loops}")
            )
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(SORTED.replace("WIDTH", str(width)))
    flags = ["--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", "--window-size=1400,1900"]
    command = [str(CHROMIUM), *QUIET, *flags, f"--user-data-dir={tmp_path}/profile", (tmp_path / "probe.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    match = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout)
    assert match, ran.stdout[-500:] + ran.stderr[-2000:]
    found = json.loads(match[1])
    assert (found["asis"], found["up"], found["down"]) == (["12", "2", "4"], ["2", "4", "12"], ["12", "4", "2"])
    # Two screens of a phone, and two lines of a name; nothing is cut off, no card has an empty half.
    assert found["first"] < 2 * 844 and 0 < found["names"] <= 50
    assert found["clipped"] == 0 and found["empty"] < 20
