"""Files from elsewhere: what is no file, too long, no JSON or of other types is an error that names the file."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipelines.checked_files import open_regular, printable, read_bounded, read_checked


@dataclass(frozen=True, kw_only=True)
class _Note:
    name: str
    counts: list[int]
    rate: float = 0.0


def test_content_becomes_the_schema(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text('{"name": "a", "counts": [1, 2], "rate": 1}')
    assert read_checked(tmp_path / "note.json", _Note) == _Note(name="a", counts=[1, 2], rate=1.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"name": "a", "counts": [1', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the content: "),
        (b'{"name": "a"}', "counts: missing"),
        (b'{"name": "a", "counts": [1, "2"]}', r"counts\.1: expected a valid integer, got '2'"),
        (b'{"name": "a", "counts": [1.5]}', r"counts\.0: "),
        (b'{"name": "a", "counts": [' + b"9" * 5000 + b"]}", "note.json: "),
        (b'{"name": "a", "counts": "\\u001b[31m"}', r"got '\\x1b\[31m'"),
    ],
)
def test_other_content_is_an_error_that_names_file_and_place(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as info:
        read_checked(tmp_path / "note.json", _Note)
    assert str(info.value).startswith(f"{tmp_path}/note.json: ") and len(str(info.value)) < len(str(tmp_path)) + 300


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"huge: 1,099,511,627,776 bytes, expected at most 67,108,864"):
        read_bounded(tmp_path / "huge")
    (tmp_path / "fits").write_bytes(b"1234")
    assert read_bounded(tmp_path / "fits", 4) == b"1234"


@pytest.mark.timeout(20)
def test_what_is_no_file_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {kind}"):
            open_regular(path)


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    assert printable("a\tb\n\u00e9") == "a\tb\n\u00e9"
    hostile = "\x1b]0;owned\x07\x1b[31m\r\u202e\u2066\ud800\x9b1m\x7f\u2028"
    shown = printable(hostile)
    assert shown.isprintable() and shown.startswith("\\x1b]0;owned\\x07")
    shown.encode()
