"""The report's page: self-contained, safe with any run name, and a page also for one run, many or none evaluated."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale import cli
from sret_scale.lab.readable_numbers import MISSING, binary_size, compact, duration, grouped, percent
from sret_scale.lab.report.chart import INK, PALETTE, Caption, printable, run_colours
from sret_scale.lab.report.compare import differing, flatten, pareto_front, seed_groups
from sret_scale.lab.report.page import Report, write_report
from sret_scale.lab.report.plots import Curve, line_chart, smoothed, spread
from sret_scale.lab.report.run_record import load_run, load_runs
from sret_scale.runs.metrics_log import Series
from tests.lab.report_runs import write_run


class _Page(HTMLParser):
    """Tags, outside addresses and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report beside the folder `runs` of teacher, student and control."""
    folder = tmp_path_factory.mktemp("trio")
    write_run(folder / "runs" / "teacher", num_loops=1, final_top1=0.88)
    write_run(folder / "runs" / "student", num_loops=11, final_top1=0.86, teacher="run:teacher")
    write_run(folder / "runs" / "control", num_loops=2, final_top1=0.84)
    return write_report([folder / "runs"], folder / "report.html")


@pytest.mark.lengthy
def test_the_page_is_self_contained_and_its_files_are_written(trio: Report) -> None:
    report, page = trio, _Page(trio.page)
    assert "script" not in page.tags and "img" not in page.tags and page.tags.count("svg") == 11
    assert not re.search(r"@import|url\((?!#)", report.page.read_text())
    for address in page.addresses:
        assert address.startswith(("#", "data:")) or (trio.page.parent / address).is_file(), address
    assert {file.suffix for file in report.files} == {".svg", ".png", ".csv"} and all(
        f.stat().st_size for f in report.files
    )
    for name in ("teacher", "student", "control", "Weight layers", "distill.teacher", "2.13.0"):
        assert name in page.text


@pytest.mark.lengthy
def test_the_csv_has_both_lines_of_a_curve(trio: Report) -> None:
    folder = trio.page.parent
    with (folder / "report_files" / "accuracy.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    last = {row["series"]: float(row["top-1, %"]) for row in rows if row["run"] == "student"}
    run = load_run(folder / "runs" / "student")
    assert last == {weights: 100 * run.of_kind("eval", weights=weights)[-1]["top1"] for weights in ("raw", "ema")}


@pytest.mark.lengthy
def test_two_runs_begin_with_their_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", images=1280)
    write_run(tmp_path / "runs" / "b", images=1280, num_loops=3)
    page = write_report([tmp_path / "runs"], tmp_path / "report.html").page.read_text()
    assert page.index("What differs") < page.index("Summary")


@pytest.mark.lengthy
def test_runs_of_different_tasks_are_not_ranked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, images=1280)
    config = tmp_path / "runs" / "b" / "config.yaml"
    config.write_text("task: language\n" + config.read_text())
    page = write_report([tmp_path / "runs"], tmp_path / "report.html").page.read_text()
    assert "cannot be compared" in page and "most accurate" not in page and "the same measure" not in page


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "names",
    [("<script>alert(1)<", "a&b\"c'", "$x^$ {{ 7*7 }}"), ("\u6f22\u5b57 \u202e", "#1d2125", "x" * 200)],
)
def test_any_run_name_is_only_text(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_run(tmp_path / "runs" / name, images=1280)
    page = _Page(write_report([tmp_path / "runs"], tmp_path / "report.html").page)
    # The title has the names of three runs.
    assert "script" not in page.tags and all(page.text.count(name) > 3 for name in names)


def test_a_young_run_and_a_diverged_run_still_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "young", edit=lambda lines: [])
    write_run(tmp_path / "runs" / "nan", edit=lambda lines: [{**line, "loss": None, "top1": None} for line in lines])
    page = _Page(write_report([tmp_path / "runs"], tmp_path / "report.html").page)
    assert "No run has been evaluated yet." in page.text and "young: no metrics yet." in page.text
    assert "train loss is not finite" in page.text


@pytest.mark.lengthy
def test_seeds_of_one_configuration_are_one_point_of_the_depth_curves(tmp_path: Path) -> None:
    for loops in (1, 2, 4):
        for seed in range(3):
            write_run(
                tmp_path / "runs" / f"{loops}-{seed}",
                num_loops=loops,
                seed=seed,
                images=1280,
                final_top1=0.7 + 0.01 * seed,
            )
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    with (tmp_path / "report_files" / "depth_applications.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["block applications"], row["seeds"]) for row in rows] == [("10.0", "3"), ("20.0", "3"), ("40.0", "3")]
    assert all(float(row["top1_low"]) < float(row["top1_mean"]) < float(row["top1_high"]) for row in rows)
    runs = load_runs([tmp_path / "runs"])[0]
    assert [len(group) for group in seed_groups(runs)] == [3, 3, 3]
    # How long a run was given before it was taken for hung makes no other run of it; its rate does.
    runs[0] = replace(
        runs[0], config={**runs[0].config, "train": {**runs[0].config["train"], "hang_timeout_s": 7200.0}}
    )
    assert [len(group) for group in seed_groups(runs)] == [3, 3, 3]
    runs[0] = replace(runs[0], config={**runs[0].config, "optim": {"learning_rate": 0.5}})
    assert [len(group) for group in seed_groups(runs)] == [1, 2, 3, 3]


def _sweep(folder: Path) -> Path:
    """Two schemes at three depths by three seeds; one lucky seed is above all others, the mean of its kind is not."""
    for scheme, loops, top1 in (
        ("one", 2, 0.7),
        ("one", 4, 0.72),
        ("one", 8, 0.74),
        ("two", 2, 0.69),
        ("two", 8, 0.72),
    ):
        for seed, noise in enumerate((0.0, 0.01, -0.01)):
            lucky = 0.04 * ((scheme, loops, seed) == ("two", 8, 1))
            run = write_run(
                folder / f"branch_scheme-{scheme}_num_loops-{loops}_seed-{seed}",
                num_loops=loops,
                seed=seed,
                images=1280,
                final_top1=top1 + noise + lucky,
                has_telemetry=seed == 0,
                edit=lambda lines: [line for line in lines if line["kind"] != "telemetry" or line["step"] < 4],
            )
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace("branch_scheme: published", f"branch_scheme: {scheme}"))
    return folder


@pytest.mark.lengthy
def test_the_page_of_a_sweep_answers_by_settings(tmp_path: Path) -> None:
    assert cli.main(["report", str(_sweep(tmp_path / "depth")), "-o", str(tmp_path / "page.html")]) == 0
    html, page = (tmp_path / "page.html").read_text(), _Page(tmp_path / "page.html")
    runs = load_runs([tmp_path / "depth"])[0]
    best = [run.last("eval", "top1", weights="ema") for run in runs if "one_num_loops-8" in run.name]
    top1 = 100 * np.array(best, dtype=np.float64)
    answer = f"{top1.mean():.1f} \N{PLUS-MINUS SIGN} {top1.std(ddof=1) / 3**0.5:.1f} % top-1 (3 seeds"
    assert f"Of 5 settings num_loops 8, branch_scheme one has the best mean: {answer}" in page.text
    rows = re.findall(r'<td data-title="(num_loops|branch_scheme|Seeds|Lowest|Highest)">(.*?)</td>', html)
    assert [text for name, text in rows if name == "num_loops"] == ["8", "8", "4", "2", "2"]
    assert [text for name, text in rows if name == "branch_scheme"] == ["one", "two", "one", "one", "two"]
    assert {text for name, text in rows if name == "Seeds"} == {"3"}
    # The lucky seed is the highest of the second setting, and leads nothing.
    highest = [float(text) for name, text in rows if name == "Highest"]
    assert max(highest) == highest[1] > top1.max()
    # One legend names the depths, a colour each; no curve has a name of its own.
    (legend,) = re.findall(r'<p class="note legend">(.*?)</p>', html, re.DOTALL)
    assert re.findall(r"</span>(\d+)</span>", legend) == ["20", "40", "80"]
    assert len(set(re.findall(r"--colour: (#\w+)", legend))) == 3
    # The first figure comes before the table; telemetry of one probe is no heat map.
    assert html.index("<figure>") < html.index('<table class="settings"') < html.index("All runs (15)")
    assert "Depth health" not in page.text
    for title in ("Training loss", "Learning rate", "Gradient norm"):
        assert f"<h3>{title}</h3>" in html


def test_a_card_without_a_course_is_left_out(tmp_path: Path) -> None:
    """A run that was evaluated once has no curve of accuracy."""

    def last(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in lines if line["kind"] != "eval" or line["step"] == lines[-1]["step"]]

    page = _Page(write_report([write_run(tmp_path / "run", images=1280, edit=last)], tmp_path / "page.html").page)
    assert "Training loss" in page.text and "Evaluation loss" not in page.text


@pytest.mark.lengthy
def test_the_command_says_what_it_wrote_and_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", images=1280)
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 0
    assert "page.html (1 run)" in capsys.readouterr().out
    # The folder of its figures, as docs/lab.md says.
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "photos.html")]) == 0
    assert f"figure files in {tmp_path / 'photos_files'}/" in capsys.readouterr().out
    assert (tmp_path / "photos_files" / "summary.csv").is_file() and not (tmp_path / "report_files").exists()
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: no run folder")


def test_differing_fields_and_flattened_keys(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / str(n), num_loops=n, images=640)) for n in (2, 3)]
    fields = differing([flatten(run.config) for run in runs])
    assert fields == {f"model.stages.{stage}.num_loops": ["2", "3"] for stage in range(3)}
    assert flatten({"a": {"b": [1, 2]}, "c": [], "d": [{"e": 1e-3}]}) == {"a.b": "[1, 2]", "c": "[]", "d.0.e": "0.001"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_keep_their_order_and_their_distance(wanted: list[float]) -> None:
    places = spread(np.array(wanted), 0.075)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) >= 0.075 - 1e-9).all() and places.min() >= 0 and places.max() <= 1 + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    cost, gain = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    front = {points[index] for index in pareto_front(cost, gain)}
    plain = {(c, g) for c, g in points if not any((a <= c and b > g) or (a < c and b >= g) for a, b in points)}
    assert front == plain


def test_a_gap_is_never_averaged_away() -> None:
    values = np.ones(600)
    values[300] = np.nan
    means = smoothed(Series(images=np.arange(600.0), values=values)).values
    assert np.isnan(means).sum() == 1 and (means[np.isfinite(means)] == 1).all()


def test_figures_follow_the_page_s_colours_and_stand_alone_as_files() -> None:
    series = Series(images=np.arange(1.0, 9.0), values=np.arange(8.0))
    caption = Caption(name="x", title='A "title"', text="", x_label="samples seen", y_label="loss")
    chart = line_chart([Curve(label="run", colour=PALETTE[0], series=series)], caption, form=".1f")
    assert (
        "var(--run-0)" in chart.inline_svg and INK not in chart.inline_svg and "&quot;title&quot;" in chart.inline_svg
    )
    assert "var(" not in chart.svg and PALETTE[0] in chart.svg and chart.png.startswith(b"\x89PNG")


def test_each_run_has_a_colour_of_its_own() -> None:
    assert run_colours(3) == list(PALETTE[:3])
    assert len(set(run_colours(40))) == 40


def test_numbers_as_people_read_them() -> None:
    assert [compact(v) for v in (0, 54.24, 999.7, 4_755_979, 1.14e9, None)] == [
        "0",
        "54.2",
        "1.00 k",
        "4.76 M",
        "1.14 G",
        MISSING,
    ]
    assert [binary_size(v) for v in (512, 536_870_912, 1.5 * 2**30)] == ["512 B", "512 MiB", "1.50 GiB"]
    assert [duration(v) for v in (42, 429, 7260)] == ["42 s", "7 min 09 s", "2 h 01 min"]
    assert (grouped(25_984), percent(0.8444), percent(float("nan")), percent(None)) == (
        "25,984",
        "84.4",
        "NaN",
        MISSING,
    )


def test_long_names_keep_the_end_that_tells_them_apart() -> None:
    names = [f"num_loops-2_warmup-1000_seed-{seed}" for seed in range(3)]
    assert len({printable(name, 13) for name in names}) == 3 and {len(printable(name, 13)) for name in names} == {13}
    assert printable("a\nb\u6f22", 13) == "a\N{MIDDLE DOT}b\N{MIDDLE DOT}"


@pytest.mark.slow
def test_a_thousand_runs_are_a_page(tmp_path: Path) -> None:
    for number in range(1000):
        loops, seed = 1 + number % 20, number // 20
        write_run(tmp_path / "runs" / f"run-{number}", num_loops=loops, seed=seed, images=640)
    report = write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = _Page(report.page)
    assert report.num_runs == 1000 and "run-999" in page.text and page.tags.count("svg") >= 8
    with (tmp_path / "report_files" / "depth_applications.csv").open() as stream:
        assert [row["seeds"] for row in csv.DictReader(stream)] == ["50"] * 20
