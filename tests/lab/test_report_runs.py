"""What the report reads from run folders: last values, gaps, remarks, and which folders it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sret_scale.lab.report.run_record import load_run, load_runs
from sret_scale.lab.report.summary import summarise
from sret_scale.runs.metrics_log import read_metrics
from tests.lab.report_runs import write_run


def _line(step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "images": 10 * step, "epoch": 0, "time_s": float(step), **fields}


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_half_written_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    file = _write(tmp_path / "metrics.jsonl", _line(1, loss=2.0))
    file.write_text(file.read_text() + '{"kind": "train", "step": 2, "ima')
    lines, remarks = read_metrics(file)
    assert [line["step"] for line in lines] == [1]
    assert remarks == ["1 half-written line of metrics.jsonl left out (line 2)."]


@pytest.mark.parametrize(
    "bad",
    [
        "[1, 2]",
        '{"kind": 3}',
        '{"kind": "train", "step": 1}',
        "\x00\x00",
        "nonsense",
        json.dumps(_line(9, x="y" * 2**20)),
        "[" * 9**5,
        json.dumps(_line(9)).replace("9", "9" * 5000),
    ],
    ids=lambda bad: bad[:20],
)
def test_lines_that_are_no_metrics_are_left_out(tmp_path: Path, bad: str) -> None:
    lines, remarks = read_metrics(_write(tmp_path / "metrics.jsonl", _line(1), bad, _line(2)))
    assert [line["step"] for line in lines] == [1, 2]
    assert "(line 2)" in remarks[0]


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(_line(1)).encode())
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 1


def test_after_a_restart_the_last_line_of_a_step_wins(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "metrics.jsonl",
        *(_line(step, loss=9.0) for step in (1, 2, 3, 4)),
        {**_line(2), "kind": "restart", "from_step": 2},
        _line(3, loss=1.0),
    )
    lines, remarks = read_metrics(file)
    # Step 4 was never reached again: it is not part of the run's history.
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"] == [(1, 9.0), (2, 9.0), (3, 1.0)]
    assert remarks == ["1 restart; the steps that were repeated are counted once."]


def test_evaluations_of_raw_and_averaged_weights_at_one_step_are_both_kept(tmp_path: Path) -> None:
    lines = [{**_line(5, top1=0.5, split="test", weights=weights), "kind": "eval"} for weights in ("raw", "ema")]
    assert len(read_metrics(_write(tmp_path / "metrics.jsonl", *lines))[0]) == 2


def test_a_value_that_is_not_finite_is_a_named_gap(tmp_path: Path) -> None:
    def spoil(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in lines:
            if line["kind"] == "train" and line["images"] > 20_000:
                line["loss"] = math.nan
        return lines

    run = load_run(write_run(tmp_path / "run", edit=spoil))
    series = run.series("train", "loss")
    assert np.isnan(series.values[series.images > 20_000]).all()
    assert np.isfinite(series.values[series.images <= 20_000]).all()
    assert any("train loss is not finite" in remark and "20,096 images" in remark for remark in run.remarks)


def test_the_summary_has_the_last_accuracy_and_the_largest_memory(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "student", num_loops=3, final_top1=0.8))
    summary = summarise(run)
    assert (summary.applications, summary.residual_sublayers, summary.weight_layers) == (30, 90, 180)
    assert summary.top1_ema == run.of_kind("eval", weights="ema")[-1]["top1"]
    assert summary.top1 == summary.top1_ema != summary.top1_raw
    assert summary.peak_bytes == 650 * 2**20 and not summary.peak_is_device
    assert (summary.role, summary.state, summary.images_seen) == ("student", "finished", 25_984)


def test_a_run_without_metrics_is_summarised_with_blanks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young")
    (folder / "metrics.jsonl").unlink()
    summary = summarise(load_run(folder))
    assert (summary.top1, summary.images_per_s, summary.peak_bytes) == (None, None, None)
    assert (summary.images_seen, summary.time_s) == (0, 0.0)


def test_a_folder_of_runs_is_read_in_a_reader_s_order(tmp_path: Path) -> None:
    for name in ("depth-100", "depth-20", "control", "student", "teacher"):
        write_run(tmp_path / name, images=640)
    (tmp_path / "shards").mkdir()
    runs, left_out = load_runs([tmp_path])
    assert [run.name for run in runs] == ["teacher", "student", "control", "depth-20", "depth-100"]
    assert left_out == []


def test_a_broken_run_among_many_is_left_out_with_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "good", images=640)
    (write_run(tmp_path / "killed", images=640) / "model.json").write_text('{"applications": 2')
    runs, left_out = load_runs([tmp_path])
    assert [run.name for run in runs] == ["good"]
    assert len(left_out) == 1 and "killed/model.json: not JSON" in left_out[0]


def test_runs_of_equal_name_are_told_apart_and_one_given_twice_counts_once(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a" / "run", images=640), write_run(tmp_path / "b" / "run", images=640)
    names = [run.name for run in load_runs([first, second, first])[0]]
    assert names == ["a/run", "b/run"]


def test_a_folder_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", images=640)
    (folder / "model.json").write_text('{"depth": 20, "parameters": "many"}')
    with pytest.raises(ValueError, match=r"no number for applications.*sret_scale 0\.1\.0.*train again"):
        load_run(folder)


@pytest.mark.parametrize("file", ["model.json", "environment.json", "config.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "run", images=640)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        load_run(folder)


@pytest.mark.parametrize("text", ["[1]", "a: [", "- \t:"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "run", images=640)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_run(folder)


def test_paths_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_runs([tmp_path / "absent"])
    with pytest.raises(FileNotFoundError, match="has none in it"):
        load_runs([tmp_path])
    (tmp_path / "report.html").touch()
    with pytest.raises(ValueError, match="is a file"):
        load_runs([tmp_path / "report.html"])
