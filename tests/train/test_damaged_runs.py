"""What a power failure or a full disk leaves of a run's small files: each is named, and the run goes on without it."""

import json
import pickle
from pathlib import Path

import pytest

from data_pipelines.stream.quarantine import Quarantine
from sret_scale.lab.report.run_record import load_runs
from sret_scale.launch.launcher import exit_status
from sret_scale.launch.preflight import is_finished
from sret_scale.runs.rank_errors import RankError, first_error, write_error
from sret_scale.runs.run_folder import RunFolder, read_status
from tests.lab.report_runs import write_run

DAMAGES = (b"", b'{"state": "fini', b"\x00" * 64, b"[1]", pickle.dumps({"state": "finished"}))


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_status_is_named_and_counts_as_unfinished(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("finished", 0)
    assert is_finished(folder) and capsys.readouterr().err == ""
    folder.status.write_bytes(content)
    assert read_status(folder) == {} and not is_finished(folder)
    assert str(folder.status) in capsys.readouterr().err


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_environment_is_named_and_written_anew(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.environment.write_bytes(content)
    folder.record_nodes([{"cpu": "here"}])
    assert json.loads(folder.environment.read_text()) == {"cpu": "here", "nodes": [{"cpu": "here"}]}
    assert str(folder.environment) in capsys.readouterr().err


def test_damaged_lines_of_a_quarantine_are_named_and_the_others_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "quarantine.jsonl"
    sound = {"index": 3, "epoch": 0, "rank": 0, "world_size": 1, "key": "a"}
    lines = [json.dumps(sound), "{}", '{"index": "4", "epoch": 0}', '{"index": 5, "epo', "\x00" * 9, "[" * 9999 + "}"]
    file.write_text("\n".join([*lines, json.dumps({**sound, "index": 6})]))
    assert Quarantine(str(file), max_bad_rate=1, samples_per_epoch=10).count == 2
    assert [f"{file} line {number}" in caplog.text for number in range(1, 8)] == [False, *[True] * 5, False]


def test_a_damaged_error_record_is_named_after_the_sound_ones(tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "rank-00000.json").write_bytes(b"")
    found = first_error(tmp_path)
    assert found is not None and "rank-00000.json: not JSON" in found.message
    write_error(tmp_path, RankError(time_s=5.0, rank=1, host="b", message="the reason", exit_code=1))
    found = first_error(tmp_path)
    assert found is not None and found.message == "the reason"


@pytest.mark.parametrize("code", [0, 256, -256, 10**30, True, "1"])
def test_a_record_of_an_error_never_ends_a_command_with_success(
    tmp_path: Path, code: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "errors").mkdir()
    record = {
        "time_s": 5.0,
        "rank": 1,
        "host": "b\x1b[31m",
        "message": "m",
        "exit_code": code,
        "trace": "t\x1b]0;x\x07",
    }
    (tmp_path / "errors" / "rank-00001.json").write_text(json.dumps(record))
    (tmp_path / "status.json").write_text(json.dumps({"state": "\x1b[31mfinished", "exit_code": code}))
    assert exit_status(tmp_path, True, []) == 1
    (tmp_path / "errors" / "rank-00001.json").write_text(json.dumps({**record, "exit_code": 7}))
    assert exit_status(tmp_path, True, []) == 7
    (tmp_path / "errors" / "rank-00001.json").unlink()
    assert exit_status(tmp_path, True, []) == 1
    said = capsys.readouterr().err
    assert "rank 1 on b" in said and said.isascii() and "\x1b" not in said and "\x07" not in said


@pytest.mark.parametrize("content", DAMAGES[:4])
def test_a_report_does_without_a_damaged_status(tmp_path: Path, content: bytes) -> None:
    (write_run(tmp_path / "run", images=640) / "status.json").write_bytes(content)
    (run,), left_out = load_runs([tmp_path])
    assert left_out == [] and run.status == {} and any("status.json" in remark for remark in run.remarks)


@pytest.mark.parametrize("name", ["environment.json", "model.json", "config.yaml"])
def test_a_damaged_run_costs_a_report_its_row_even_when_it_is_named_by_itself(tmp_path: Path, name: str) -> None:
    good, bad = write_run(tmp_path / "good", images=640), write_run(tmp_path / "bad", images=640)
    (bad / name).write_bytes(b"{")
    runs, left_out = load_runs([good, bad])
    assert [run.name for run in runs] == ["good"]
    assert len(left_out) == 1 and str(bad / name) in left_out[0]
