"""Pairs of texts: written to ordinary tars from tsv and moses files, streamed byte for byte; bad lines are named."""

import gc
import hashlib
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import LoaderState, Step, TrainLoader, evaluation_batches
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.webdataset_door import to_webdataset
from data_pipelines.text.pieces import TextWindows
from data_pipelines.text.tokens import tokens_of, train_pieces
from data_pipelines.upkeep.repair import repair_shards
from data_pipelines.upkeep.stats import summarize_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main

# A line separator and a form feed inside a line, which part no lines; one line alone ends in both marks.
PAIRS = [
    ("Speichern", "Save"),
    ("Gr\u00fc\u00dfe\u2028an alle", "Greetings\u2028to all"),
    ("A\x0cB", "A\x0c B"),
    ("x", "y"),
]


def moses(folder: Path, pairs: list[tuple[str, str]], end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for side, ending in enumerate(("de", "en")):
        (folder / f"train.{ending}").write_bytes("".join(pair[side] + end for pair in pairs).encode())
    return Path(f"{folder / 'train.de'},{folder / 'train.en'}")


def tsv(folder: Path, pairs: list[tuple[str, str]], end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # The last line ends without a mark.
    (folder / "train.tsv").write_bytes(end.join("\t".join(pair) for pair in pairs).encode())
    return folder / "train.tsv"


def write(kind: str, source: Path, target: Path) -> None:
    text = TextWindows(window=64)
    config = WriteConfig(kind=kind, source=source, text=text, shard_samples=3, options=ImageOptions(metadata=False))
    write_shards(config, target)


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.lengthy
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["moses", "tsv"])
def test_any_webdataset_reader_gets_the_pairs_back(tmp_path: Path, kind: str, end: str) -> None:
    write(kind, (moses if kind == "moses" else tsv)(tmp_path, PAIRS, end), tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    tars = [str(tmp_path / "set" / name) for name in shards.shard_names]
    read = list(wds.WebDataset(tars, shardshuffle=False).to_tuple("__key__", "source", "target"))
    assert sorted(read) == [
        (f"train/{number:07d}", source.encode(), target.encode())
        for number, (source, target) in enumerate(PAIRS, start=1)
    ]
    assert shards.is_pairs and shards.is_text and len(tars) == 2 and verify_shards(tmp_path / "set") == []
    sample = next(iter(to_webdataset(shards, batch_size=4)))
    assert (sample["__key__"], sample["source"], sample["target"]) in read
    longest = max(len(target.encode()) for _, target in PAIRS)
    assert summarize_shards(tmp_path / "set")["target_bytes"]["largest"] == longest
    gc.collect()


def test_a_changed_byte_of_either_side_is_found(tmp_path: Path) -> None:
    write("tsv", tsv(tmp_path, PAIRS), tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    file = tmp_path / "set" / shards.shard_names[0]
    data = bytearray(file.read_bytes())
    data[int(shards.members["target"].offset[1])] ^= 1
    file.write_bytes(data)
    [finding] = verify_shards(tmp_path / "set")
    assert finding.key == shards.key(1) and "target" in finding.reason
    with pytest.raises(ValueError, match="text is not repaired here; write the shards again"):
        repair_shards(tmp_path / "set", tmp_path / "repaired")


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0\t\n\r\ufeff"), min_size=1)] * 2))
)
def test_lines_are_those_of_the_slow_twin(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    """A batch has each pair once, whatever Unicode calls a line; those with a side of white space are left out."""
    kept = [pair for pair in pairs if all(side.encode().strip() and len(side.encode()) <= 64 for side in pair)]
    if not kept:
        return
    folder = tmp_path_factory.mktemp("lines")
    write("moses", moses(folder, kept), folder / "set")
    shards, found = open_shards(folder / "set"), []
    for batch in evaluation_batches(
        shards, context=1, batch_size=4, rank=0, world_size=1, config=DataConfig(workers=1)
    ):
        for row, view in zip(batch.images[batch.valid], batch.views[batch.valid].tolist(), strict=True):
            found.append(tuple(bytes(side[:n].tolist()).decode() for side, n in zip(row, view[1:4:2], strict=True)))
            assert not row[0, view[1] :].any() and not row[1, view[3] :].any()
    assert sorted(found) == sorted(kept)


def test_training_reads_the_same_on_any_number_of_ranks_and_resumes(tmp_path: Path) -> None:
    write("tsv", tsv(tmp_path, PAIRS * 5), tmp_path / "set")
    shards = open_shards(tmp_path / "set")

    def steps(rank: int = 0, world_size: int = 1, state: LoaderState | None = None, count: int = 4) -> list[Step]:
        size = {"micro_batch_size": 6 // world_size, "rank": rank, "world_size": world_size}
        return list(islice(TrainLoader(shards, DataConfig(workers=1), context=1, seed=5, **size).steps(state), count))

    one = steps()
    for step, parts in zip(one, zip(*(steps(rank, 3) for rank in range(3)), strict=True), strict=True):
        assert torch.equal(step.micro_batches[0].images, torch.cat([part.micro_batches[0].images for part in parts]))
    state = LoaderState.from_json(one[1].next_state.to_json())
    for before, after in zip(one[2:], steps(state=state, count=2), strict=True):
        assert torch.equal(before.micro_batches[0].images, after.micro_batches[0].images)


BAD = [
    (b"\xff\xfe", b"text", "a source that is not UTF-8 (invalid start byte at byte 0)"),
    (b"Text", b"  ", "an empty target: expected a text, and in a tsv a tab between the two"),
    (b"", b"text", "an empty source"),
    (b"\xef\xbb\xbfText", b"text", "a byte order mark in the source"),
    (b"Te\0xt", b"text", "a NUL in the source"),
    (b"Text", b"te\txt", "a tab in the target"),
    ("\u3000".encode(), b"text", "an empty source: expected a text"),
    (b"T" * 65, b"text", "a source of 65 bytes, expected at most 64 (--window)"),
]


def test_one_file_twice_is_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    write("moses", Path(f"{tmp_path / 'a.txt'},{tmp_path / 'a.txt'}"), tmp_path / "set")
    shards = open_shards(tmp_path / "set")
    with ShardReader(shards) as reader:
        assert {(reader.read(i), reader.read(i, "target")) for i in (0, 1)} == {(b"one", b"one"), (b"two", b"two")}


@pytest.mark.parametrize(("source", "target", "reason"), BAD)
def test_a_bad_line_is_named_and_may_be_left_out(
    tmp_path: Path, source: bytes, target: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tsv").write_bytes(b"Eins\tone\n" + source + b"\t" + target + b"\nZwei\ttwo\n")
    command = ["shards", "write", "tsv", str(tmp_path / "a.tsv"), str(tmp_path / "set"), "--window", "64"]
    assert main(command) == 2
    assert f"'a.tsv:2': {reason}" in capsys.readouterr().err
    assert main([*command, "--on-bad", "skip", "--max-bad-rate", "0.5"]) == 0
    assert "2 samples of 1 classes in 1 shard" in (out := capsys.readouterr().out) and "1 left out" in out
    [line] = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "a.tsv:2" and json.loads(line)["reason"].startswith(reason)


@pytest.mark.parametrize("kind", ["moses", "tsv"])
def test_the_set_has_tokens_of_its_kept_pairs(tmp_path: Path, kind: str) -> None:
    """What sentencepiece makes of both sides, by its hash in the manifest; the same however the writing went."""
    bad = [("x" * 65, "too long"), ("", "empty")]
    source = (moses if kind == "moses" else tsv)(tmp_path, PAIRS * 20 + bad)
    options = ImageOptions(metadata=False, on_bad="skip")
    config = WriteConfig(kind=kind, source=source, text=TextWindows(window=64), options=options, vocabulary=280)
    one, two = (write_shards(config, tmp_path / name, max_bad_rate=0.5) for name in ("one", "two"))
    expected = train_pieces([side for pair in PAIRS * 20 for side in pair], 280)
    assert (tmp_path / "one" / "tokens.model").read_bytes() == expected
    assert one == two and one.writer["tokens_sha256"] == hashlib.sha256(expected).hexdigest()
    assert one.writer["vocabulary"] == 280 and tokens_of(str(tmp_path / "two" / "tokens.model")).num_tokens == 280
    tokens = tmp_path / "two" / "tokens.model"
    assert verify_shards(tmp_path / "two") == []
    tokens.write_bytes(tokens.read_bytes()[:-1])
    [finding] = verify_shards(tmp_path / "two")
    assert str(finding).startswith(
        f"tokens.model: at offset 0: expected a file of SHA-256 {one.writer['tokens_sha256']}"
    )
    tokens.unlink()
    [finding] = verify_shards(tmp_path / "two")
    assert finding.reason.endswith("found no such file")
    with pytest.raises(ValueError, match=r"two/tokens\.model is gone or has changed: remove .*two, and write"):
        write_shards(config, tmp_path / "two")
    # Once more is not written again, and another vocabulary is another set.
    assert write_shards(config, tmp_path / "one") == one
    with pytest.raises(ValueError, match="holds a complete shard set made with another vocabulary"):
        write_shards(replace(config, vocabulary=None), tmp_path / "one")
    plain = write_shards(replace(config, vocabulary=None), tmp_path / "plain", max_bad_rate=0.5)
    assert not {"vocabulary", "tokens_sha256"} & set(plain.writer) and plain.fingerprint == one.fingerprint


def test_tokens_that_cannot_be_leave_no_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tsv(tmp_path, PAIRS))
    for options, message in (
        (["--vocabulary", "9999"], "a vocabulary of 9,999 pieces: Vocabulary size too high (9999)"),
        (["--vocabulary", "20"], "a vocabulary of 20 pieces: Vocabulary size is smaller than required_chars. 20 vs "),
        (["--vocabulary", "0"], "vocabulary: expected 1 or more, got 0"),
    ):
        assert main(["shards", "write", "tsv", source, str(tmp_path / "set"), *options]) == 2
        assert message in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert main(["shards", "write", "text", source, str(tmp_path / "set"), "--vocabulary", "300"]) == 2
    assert "shards write text: has no use for --vocabulary" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert main(["shards", "write", "tsv", source, str(tmp_path / "set"), "--vocabulary", "300"]) == 2
    assert "a vocabulary needs sentencepiece: " in (err := capsys.readouterr().err) and "setup text" in err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("kind", "source", "options", "message"),
    [
        ("moses", "a.de,a.en", [], "a.de has 2 lines and "),
        ("moses", "a.de,a.de,a.en", [], "expected two files, as in train.de,train.en, without"),
        ("moses", "a.de", [], "expected two files, as in train.de,train.en, without"),
        ("tsv", "a.de,a.en", [], "expected one file of lines with a tab, without"),
        ("moses", "a.de,none.en", [], "none.en"),
        ("tsv", "empty.tsv", [], "empty.tsv: an empty file; give it lines"),
        ("tsv", "a.de", [], ": an empty target: expected a text, and in a tsv a tab between the two"),
        ("tsv", "a.de", ["--window", "0"], "window 0: expected 1 to 65,536 bytes"),
        ("tsv", "a.de", ["--carried", "8"], "shards write tsv: has no use for --carried"),
        ("tsv", "a.de", ["--split", "train"], "split 'train': pairs have none"),
    ],
)
def test_bad_files_and_options_are_refused(
    tmp_path: Path, kind: str, source: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    (tmp_path / "a.en").write_text("one\ntwo\nthree")
    (tmp_path / "empty.tsv").write_text("")
    names = ",".join(str(tmp_path / name) for name in source.split(","))
    assert main(["shards", "write", kind, names, str(tmp_path / "set"), *options]) == 2
    assert message in (err := capsys.readouterr().err), err
