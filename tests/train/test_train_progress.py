"""What a person sees of a run: plain lines in a log, a bar on a terminal, nothing from other ranks."""

import io
import sys
import time

import pytest

from sret_scale.train.progress import LOG_INTERVAL_S, RunProgress, format_s


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element, as RunProgress reads it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (-3, "0:00"),
        (4.4, "0:04"),
        (59.6, "1:00"),
        (245, "4:05"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_seconds_read_as_minutes_or_hours(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


def test_off_a_terminal_lines_have_images_loss_rate_and_remaining_time(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with RunProgress("deep", total_samples=10_000, unit="images", is_shown=True) as shown:
        clock[0] += 20
        shown.update(2_000, "loss 2.3457  1,234 images/s")
    line = capsys.readouterr().out
    # 2,000 images took 20 s, so 8,000 will take 80 s.
    assert line == "deep: 2,000 of 10,000 images  loss 2.3457  1,234 images/s  1:20 left\n"
    assert "\x1b" not in line


def test_off_a_terminal_lines_come_at_an_interval_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with RunProgress("deep", total_samples=1_000, unit="images", is_shown=True) as shown:
        for images in range(100, 1_001, 100):
            clock[0] += LOG_INTERVAL_S / 3
            shown.update(images, "loss 1.0000  50 images/s")
    seen = [line.split(" of ")[0] for line in capsys.readouterr().out.splitlines()]
    assert seen == ["deep: 100", "deep: 400", "deep: 700", "deep: 1,000"]


def test_remaining_time_counts_from_where_a_run_continues(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with RunProgress("deep", total_samples=10_000, unit="images", is_shown=True) as shown:
        clock[0] += 500
        shown.continue_from(9_000)
        clock[0] += 30
        shown.update(9_500, "loss 1.0000  17 images/s")
    assert capsys.readouterr().out.endswith("0:30 left\n")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stdout = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    with RunProgress("deep", total_samples=10, unit="images", is_shown=False) as shown:
        shown.continue_from(5)
        shown.update(10, "loss 1.0000  1 images/s")
        shown.say("top-1 10.00%")
    assert stdout.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_and_text_stands_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with RunProgress("deep", total_samples=200, unit="images", is_shown=True) as shown:
        shown.update(100, "loss 2.3457  1,234 images/s")
        shown.say("deep: [100] images: top-1 10.00%")
        shown.update(200, "loss 1.5000  99 images/s")
    text = terminal.getvalue()
    # Square brackets are text here, not rich's markup, and the line is written once.
    assert text.count("deep: [100] images: top-1 10.00%") == 1
    final = next(line for line in reversed(text.splitlines()) if "deep" in line)
    assert "200/200" in final and "loss 1.5000  99 images/s" in final and "\u2501" in final
    assert text.index("top-1") < text.rindex("200/200")
