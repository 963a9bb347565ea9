"""A tracker that fails, at whatever moment, is told of and costs the run nothing; what is no tracker is refused."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sret_scale.train.telemetry.trackers import open_metrics


@contextlib.contextmanager
def fails_at_its_begin(_: Path) -> Iterator[Any]:
    raise ConnectionError("no server")
    yield


@contextlib.contextmanager
def fails_at_its_end(folder: Path) -> Iterator[Any]:
    try:
        yield lambda record: (folder / "taken").write_text(record["kind"])
    finally:
        raise RuntimeError("no end")


def takes_records(record: dict[str, Any]) -> None:
    """What is no context manager."""


@pytest.mark.parametrize("name", ["fails_at_its_begin", "fails_at_its_end"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_tracker_that_fails_ends_nothing(
    name: str, error: type[BaseException] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected, contextlib.ExitStack() as stack:
        open_metrics(tmp_path / "metrics.jsonl", (f"{__name__}:{name}",), stack).write("train", {"images": 8})
        if error is not None:
            raise error
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "images": 8}
    assert (tmp_path / "taken").exists() == (name == "fails_at_its_end")
    said = {
        "fails_at_its_begin": f"tracker {__name__}:{name} gets no records: no server",
        "fails_at_its_end": f"tracker {__name__}:{name} failed at its end: no end",
    }
    assert said[name] in capsys.readouterr().out


def test_a_function_that_is_no_tracker_is_refused(tmp_path: Path) -> None:
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(ValueError, match="gave a NoneType: expected a context manager"),
    ):
        open_metrics(tmp_path / "metrics.jsonl", (f"{__name__}:takes_records",), stack)
