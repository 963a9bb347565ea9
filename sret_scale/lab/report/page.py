"""Writes the report: one page that answers by itself, from disk and without scripts, and its figures as files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from data_pipelines.atomic_files import write_whole
from sret_scale.lab.readable_numbers import compact, duration, grouped, percent
from sret_scale.lab.report.chart import Chart, css_colour, csv_text, depth_colours, run_colours
from sret_scale.lab.report.compare import differing, flatten
from sret_scale.lab.report.depth_curves import depth_figures
from sret_scale.lab.report.evaluation_depth import curves_of, evaluation_depth_figures
from sret_scale.lab.report.figures import basic_figures
from sret_scale.lab.report.health import alarms, health_figures
from sret_scale.lab.report.memory_figures import memory_figures
from sret_scale.lab.report.run_record import RunRecord, load_runs, measure_of
from sret_scale.lab.report.settings import headline, settings_of, settings_table
from sret_scale.lab.report.summary import COLUMNS, Summary, best_rows, columns_for, summarise, summary_table

FEW_RUNS = 4
"""Of so many at most the courses are the answer, of more the curves over depth."""
FIRST_FIGURES = 3
"""So many stand before the table of a sweep's settings."""
MOST_RUNS_ACROSS = 6  # With more runs than this, a table of differences has the runs as its rows.


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written: the page, its figures' files, and what the reader was told of the runs."""

    page: Path
    files: tuple[Path, ...]
    num_runs: int
    left_out: tuple[str, ...]


def write_report(paths: Sequence[Path], page: Path, *, note: str = "", first: Sequence[Chart] = ()) -> Report:
    """Report on the runs in `paths`: `page`, and SVG, PNG and CSV of each figure in the folder PAGE_files.

    `note` stands under the title: what a reader must know before the numbers. `first` are figures before the others.

    Raises FileNotFoundError or ValueError for a path that is no run, OSError where the page cannot be written.
    """
    if page.is_dir():
        raise IsADirectoryError(f"{page} is a folder: expected a file to write, such as -o {page / 'report.html'}")
    runs, left_out = load_runs(paths)
    summaries = [summarise(run) for run in runs]
    depths = [summary.applications for summary in summaries]
    by_depth = len(runs) > FEW_RUNS and len(set(depths)) > 1
    colours = depth_colours(depths) if by_depth else run_colours(len(runs))
    basic, depth = basic_figures(runs, colours, named=not by_depth), depth_figures(runs, summaries)
    basic += health_figures(runs) + memory_figures(summaries, colours)
    basic = evaluation_depth_figures([curve for run in runs for curve in curves_of(run)]) + basic
    charts = [*first, *(depth + basic if len(runs) > FEW_RUNS else basic + depth)]
    legend = dict(sorted(zip(depths, map(css_colour, colours), strict=True))) if by_depth else {}
    folder = page.with_name(f"{page.stem}_files")
    text = render(runs, summaries, charts, colours, files=folder.name, left_out=left_out, note=note, legend=legend)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot write the report {page}: {error.strerror}; choose another page with -o"
        raise OSError(error.errno, reason) from error
    files = [file for chart in charts for file in chart.write(folder)]
    files.append(folder / "summary.csv")
    files[-1].write_text(csv_text(summary_table(summaries)), encoding="utf-8")
    # The page appears whole or not at all: a browser may be looking at the last one.
    write_whole(page, text)
    return Report(page=page, files=tuple(files), num_runs=len(runs), left_out=tuple(left_out))


def render(
    runs: Sequence[RunRecord],
    summaries: Sequence[Summary],
    charts: Sequence[Chart],
    colours: Sequence[str],
    *,
    files: str,
    left_out: Sequence[str],
    note: str,
    legend: Mapping[float, str],
) -> str:
    """The page's HTML. Everything that comes from a run is escaped; only our own SVG is not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sret_scale.lab.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    settings = settings_of(runs, summaries)
    is_one_measure = len(set(map(measure_of, runs))) == 1
    accuracy = " or ".join(dict.fromkeys(summary.accuracy for summary in summaries))
    rows = list(zip(summaries, map(css_colour, colours), strict=True))
    remarks = [f"{run.name}: {remark}" for run in runs for remark in [*run.remarks, *alarms(run)]]
    remarks += [f"{run.name}: no metrics yet." for run in runs if not run.lines]
    remarks += [f"Left out: {reason}" for reason in left_out]
    configs = [flatten(run.config) for run in runs]
    # Each run has a command of its own.
    facts = [flatten({key: value for key, value in run.environment.items() if key != "command"}) for run in runs]
    return environment.get_template("report.html").render(
        title=_title(runs),
        lead=INCOMPARABLE
        if not is_one_measure
        else headline(settings, accuracy)
        if len(settings) < len(rows) and settings
        else lead(summaries),
        page_note=note,
        rows=rows,
        columns=columns_for(summaries),
        best=[best_rows(column, list(summaries)) if is_one_measure else set() for column in COLUMNS],
        charts=charts,
        settings=settings_table(settings, accuracy) if len(rows) > FEW_RUNS else [],
        num_settings=len(settings),
        legend=legend,
        first=FIRST_FIGURES if len(rows) > FEW_RUNS else len(charts),
        files=files,
        remarks=remarks,
        difference=_difference(runs, configs),
        shared_config=_shared(configs),
        shared_environment=_shared(facts),
        repeats=[(run.name, run.environment.get("command", "not recorded")) for run in runs],
        environment_difference=_difference(runs, facts),
        grouped=grouped,
    )


INCOMPARABLE = "These runs have different tasks or tokens: what they reached cannot be compared."


def lead(summaries: Sequence[Summary]) -> str:
    """The answer in a sentence: the most accurate run, and what it took."""
    scored = [s for s in summaries if s.top1 is not None and s.top1 == s.top1]
    if not scored:
        return "No run has been evaluated yet."
    best = max(scored, key=lambda s: s.top1 or 0.0)
    weights = "averaged weights" if best.top1_ema is not None else "raw weights"
    start = f"{best.run} is the most accurate: " if len(scored) > 1 else f"{best.run}: "
    return (
        f"{start}{percent(best.top1)} % {best.accuracy} ({weights}) with {grouped(best.applications)} block "
        f"applications and {compact(best.parameters)} parameters, after {grouped(best.images_seen)} samples in "
        f"{duration(best.time_s)}."
    )


def _title(runs: Sequence[RunRecord]) -> str:
    names = [run.name for run in runs]
    if len(names) <= 3:
        return " \N{MIDDLE DOT} ".join(names)
    return f"{len(names)} runs"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A plain table of texts."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _difference(runs: Sequence[RunRecord], fields: Sequence[Mapping[str, str]]) -> Table | None:
    """The fields in which runs differ; None if there are none. Fields down and runs across, of many the other way."""
    columns, names = differing(fields), [run.name for run in runs]
    if not columns:
        return None
    if len(runs) <= MOST_RUNS_ACROSS:
        return Table(header=("field", *names), rows=tuple((key, *values) for key, values in columns.items()))
    return Table(header=("run", *columns), rows=tuple(zip(names, *columns.values(), strict=True)))


def _shared(fields: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Keys with the same text everywhere."""
    return [(key, text) for key, text in fields[0].items() if all(other.get(key) == text for other in fields[1:])]
