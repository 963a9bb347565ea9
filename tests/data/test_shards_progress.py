"""What a person sees of shard work: a bar on a terminal, lines in a log; both with rates and the time that is left."""

import io
import sys
import time

import pytest

from data_pipelines.stream.processes import Progress
from sret_scale.commands.shards.progress import progress_bar


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: seconds)


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    at(monkeypatch, 100.0)
    with progress_bar("writing") as show:
        for seconds, samples in ((105.0, 4_000), (115.0, 15_000), (117.0, 16_000), (130.0, 30_000), (131.0, 50_000)):
            at(monkeypatch, seconds)
            show(Progress(samples=samples, bytes=samples * 110_000, total_samples=50_000))
    assert capsys.readouterr().err.splitlines() == [
        "writing: 15,000 of 50,000 samples  1,000 samples/s  110.0 MB/s  0:35 left",
        "writing: 30,000 of 50,000 samples  1,000 samples/s  110.0 MB/s  0:20 left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    at(monkeypatch, 100.0)
    with progress_bar("verifying") as show:
        at(monkeypatch, 110.0)
        show(Progress(samples=10_000, bytes=1_100_000_000, total_samples=50_000))
    text = terminal.getvalue()
    assert "verifying" in text and "10000/50000" in text and "1,000 samples/s  110.0 MB/s" in text
