"""The report on depth: lines of one kind, the best rate, health maps, memory."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from sret_scale.lab.readable_numbers import evenly
from sret_scale.lab.report.health import alarms, health_figures
from sret_scale.lab.report.page import write_report
from sret_scale.lab.report.run_record import load_run
from tests.lab.report_runs import write_run


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def _run(folder: Path, *, config: dict[str, Any] | None = None, scheme: str = "published", **fields: Any) -> Path:
    """A run whose branch scheme, and config sections, are others."""
    run = write_run(folder, images=640, **fields)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for stage in tree["model"]["stages"]:
        stage["branch_scheme"] = scheme
    for section, values in (config or {}).items():
        tree[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return run


@pytest.mark.lengthy
def test_depths_of_one_kind_are_one_line_and_kinds_are_named(tmp_path: Path) -> None:
    for scheme, top1 in (("published", 0.8), ("loop_aware", 0.82)):
        for loops in (1, 2, 4):
            _run(tmp_path / "runs" / f"{scheme}{loops}", scheme=scheme, num_loops=loops, final_top1=top1)
    for loops in (2, 4):
        config = {"train": {"total_images": 26000 // loops}, "optim": {"warmup_images": 100 // loops}}
        _run(tmp_path / "runs" / f"flops{loops}", num_loops=loops, config=config)
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    lines: dict[str, list[float]] = {}
    for row in _rows(tmp_path / "page_files" / "depth_applications.csv"):
        lines.setdefault(row["line"], []).append(float(row["applications"]))
    assert list(lines.values()) == [[20, 40], [10, 20, 40], [10, 20, 40]]
    flops, aware, published = lines
    assert "equal FLOPs" in flops and "loop_aware" in aware and "published" in published


@pytest.mark.lengthy
def test_of_a_sweep_over_rates_each_depth_keeps_its_best(tmp_path: Path) -> None:
    rates = (0.001, 0.002, 0.004)
    for scheme, best in (("published", {2: 0.004, 4: 0.001}), ("loop_aware", {2: 0.002, 4: 0.002})):
        for loops in (2, 4):
            for rate in rates:
                top1 = 0.8 if rate == best[loops] else 0.7
                name = f"{scheme}-{loops}-{rate}"
                config = {"optim": {"learning_rate": rate}}
                _run(tmp_path / "runs" / name, scheme=scheme, num_loops=loops, final_top1=top1, config=config)
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    rows = [row for row in _rows(tmp_path / "page_files" / "rate_transfer.csv") if row["is_best"] == "1"]
    found = {(row["line"], row["applications"]): float(row["learning_rate"]) for row in rows}
    assert found == {
        ("branch_scheme published", "20"): 0.004,
        ("branch_scheme published", "40"): 0.001,
        ("branch_scheme loop_aware", "20"): 0.002,
        ("branch_scheme loop_aware", "40"): 0.002,
    }
    assert len(_rows(tmp_path / "page_files" / "depth_applications.csv")) == 4


@pytest.mark.lengthy
def test_the_health_of_depth_is_a_map_and_alarms_are_remarks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_loops=3, images=25_600, has_telemetry=True)
    page = write_report([run], tmp_path / "page.html").page.read_text()
    assert page.count("stage 2 grows 1.3-fold a loop (first at") == 1 and "Depth health of run" in page
    rows = _rows(tmp_path / "page_files" / "health_0.csv")
    first = [row for row in rows if row["images"] == rows[0]["images"]]
    assert len(first) == 30 and [row["loop"] for row in first[:3]] == ["0", "1", "2"]
    assert first[2]["gradient_cosine"] == "nan" and float(first[1]["rms"]) > float(first[0]["rms"])


def test_telemetry_of_another_format_is_passed_over(tmp_path: Path) -> None:
    def spoil(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in lines:
            if line["kind"] == "telemetry":
                line["blocks"] = [{"stage": 0}] if line["step"] > 50 else "none"
        return lines

    run = load_run(write_run(tmp_path / "run", images=6400, has_telemetry=True, edit=spoil))
    assert health_figures([run]) == [] and alarms(run) == []
    assert evenly(1000, 60)[::59] == [0, 999] and len(evenly(1000, 60)) == 60 and evenly(3, 60) == [0, 1, 2]


@pytest.mark.lengthy
def test_memory_is_compared_with_its_prediction(tmp_path: Path) -> None:
    for loops in (2, 3, 5):
        write_run(tmp_path / "runs" / str(loops), num_loops=loops, images=640)
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    rows = _rows(tmp_path / "page_files" / "memory_prediction.csv")
    assert [float(row["predicted_activation_bytes"]) / 2**20 for row in rows] == [45, 47, 52]
