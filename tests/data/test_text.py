"""Text: windows as arithmetic, written to ordinary tars, streamed byte for byte; refused where it is bad."""

import gc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import DataConfig
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import Batch, LoaderState, TrainLoader, evaluation_batches
from data_pipelines.stream.webdataset_door import to_webdataset
from data_pipelines.text.pieces import TextWindows
from data_pipelines.upkeep.contact_sheet import draw_contact_sheet
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.cli import main
from tests.reference.text_windows import windows_of

# Latin-1, a NUL, a line separator and two kinds of line ends: bytes are kept as they are. Their lengths are odd ones.
DOCUMENTS = {
    "b/second.txt": "Wer r\u00e4t, irrt.\r\n\u2028".encode() * 3 + b"\0\xff" + b"EXIF" * 9,
    "first.txt": bytes(range(256)) + b"?" * 7,
    "third.txt": b"A",
}


def write_texts(folder: Path, documents: dict[str, bytes]) -> Path:
    for name, data in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make(folder: Path, *, window: int = 16, carried: int = 0, **options: Any) -> ShardSet:
    source = write_texts(folder / "texts", DOCUMENTS)
    text = TextWindows(window=window, carried=carried)
    config = WriteConfig(kind="text", source=source, text=text, shard_samples=7, **options)
    write_shards(config, folder / "set")
    return open_shards(folder / "set")


def loader(shards: ShardSet, rank: int = 0, world_size: int = 1, **fields: Any) -> TrainLoader:
    rows = 12 // world_size
    size = {"context": 16, "rank": rank, "world_size": world_size, "micro_batch_size": rows}
    return TrainLoader(shards, DataConfig(**fields), seed=5, **size)


def evaluated(shards: ShardSet, rank: int = 0, world_size: int = 1, context: int = 16) -> list[Batch]:
    size = {"context": context, "batch_size": 5, "rank": rank, "world_size": world_size}
    return list(evaluation_batches(shards, DataConfig(), **size))


@given(
    document=st.binary(min_size=1, max_size=80),
    sizes=st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
)
def test_windows_are_those_of_the_slow_twin(document: bytes, sizes: tuple[int, int]) -> None:
    window, carried = sizes
    cut, found = TextWindows(window=window, carried=carried), []
    for start in cut.starts(len(document)):
        piece = document[start : start + window]
        counted = cut.num_counted(start, len(piece))
        found.append((piece[: len(piece) - counted], piece[len(piece) - counted :]))
    assert found == windows_of(document, window, carried)
    assert b"".join(new for _, new in found) == document


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_webdataset_reader_gets_the_documents_back(tmp_path: Path) -> None:
    shards = make(tmp_path)
    tars = [str(tmp_path / "set" / name) for name in shards.shard_names]
    read = {one["__key__"]: one["txt"] for one in wds.WebDataset(tars, shardshuffle=False)}
    for name, data in DOCUMENTS.items():
        stem = name.removesuffix(".txt")
        assert b"".join(read[key] for key in sorted(read) if key.startswith(f"{stem}/")) == data
    assert verify_shards(tmp_path / "set") == [] and len(tars) > 1
    sample = next(iter(to_webdataset(shards, batch_size=4)))
    assert read[sample["__key__"]] == sample["txt"]
    gc.collect()


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    shards = make(tmp_path)
    file = tmp_path / "set" / shards.shard_names[0]
    data = bytearray(file.read_bytes())
    data[int(shards.offset[2])] ^= 1
    file.write_bytes(data)
    [finding] = verify_shards(tmp_path / "set")
    assert finding.key == shards.key(2) and "have changed" in finding.reason


@pytest.mark.parametrize("carried", [0, 6])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_counts_every_byte_once_with_its_context(tmp_path: Path, carried: int, world_size: int) -> None:
    shards = make(tmp_path, carried=carried)
    rows = {}
    for rank in range(world_size):
        for batch in evaluated(shards, rank, world_size):
            for row, index, view in zip(batch.images, batch.indices.tolist(), batch.views.tolist(), strict=True):
                if index >= 0:
                    start, counted = view[1], view[3]
                    assert not row[start + counted :].any()
                    piece = bytes(row.tolist())
                    rows[shards.key(index)] = piece[:start], piece[start : start + counted]
    expected = {
        f"{name.removesuffix('.txt')}/{number:07d}": window
        for name, data in DOCUMENTS.items()
        for number, window in enumerate(windows_of(data, 16, carried))
    }
    assert rows == expected


def test_training_reads_the_same_on_any_number_of_ranks_and_resumes(tmp_path: Path) -> None:
    shards = make(tmp_path)
    one = list(islice(loader(shards).steps(), 5))
    three = zip(*(islice(loader(shards, rank, 3).steps(), 5) for rank in range(3)), strict=True)
    for step, parts in zip(one, three, strict=True):
        assert torch.equal(step.micro_batches[0].images, torch.cat([part.micro_batches[0].images for part in parts]))
    state = LoaderState.from_json(one[2].next_state.to_json())
    for before, after in zip(one[3:], loader(shards, worker_kind="threads").steps(state), strict=False):
        assert torch.equal(before.micro_batches[0].images, after.micro_batches[0].images)
        assert torch.equal(before.micro_batches[0].views, after.micro_batches[0].views)


@pytest.mark.multi_process
def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    shards = make(tmp_path)
    ways = [islice(loader(shards, worker_kind=kind).steps(), 2) for kind in ("threads", "processes")]
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one.micro_batches[0].images, other.micro_batches[0].images)


def test_text_and_images_are_not_taken_for_one_another(tmp_path: Path) -> None:
    shards = make(tmp_path)
    with pytest.raises(ValueError, match="expected shards of images, got shards of text: task=language reads text"):
        TrainLoader(shards, micro_batch_size=4, image_size=16).steps()
    with pytest.raises(ValueError, match=r"windows of 16 bytes do not fit into a context of 8: set model\.context=16"):
        evaluated(shards, context=8)
    with pytest.raises(ValueError, match=r"text is not transformed: set data\.transform=null"):
        loader(shards, transform="os:getcwd").steps()
    images = WriteConfig(
        kind="idx", source=Path(__file__).parents[2] / "data_pipelines/sample/fashion_mnist", split="test"
    )
    write_shards(images, tmp_path / "images")
    with pytest.raises(ValueError, match="expected shards of text, got shards of images"):
        evaluated(open_shards(tmp_path / "images"))


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ({"a.txt": b""}, [], "a.txt: an empty file; remove it"),
        ({"a.md": b"text"}, [], "no .txt files in it"),
        ({"a.txt": b"ten bytes."}, ["--window", "11"], "expected a text of at least one window of 11 bytes, got 10"),
        (DOCUMENTS, ["--window", "16", "--carried", "16"], "carried 16: expected 0 to 15 bytes"),
        (DOCUMENTS, ["--window", "70000"], "window 70000: expected 1 to 65,536 bytes"),
        (DOCUMENTS, ["--split", "0.1"], "a share between 0 and 1 of an image folder, or a name"),
        (DOCUMENTS, ["--split", "train"], "split 'train': texts have none"),
        (DOCUMENTS, ["--resize", "32"], "shards write text: has no use for --resize"),
    ],
)
def test_bad_texts_and_options_are_refused(
    tmp_path: Path, documents: dict[str, bytes], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_texts(tmp_path / "texts", documents)
    assert main(["shards", "write", "text", str(source), str(tmp_path / "set"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_text_has_no_pictures(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match="expected images, got text, of which there are no pictures"):
        draw_contact_sheet(tmp_path / "set")


def test_a_window_is_of_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "write", "folder", str(tmp_path), str(tmp_path / "set"), "--window", "16"]) == 2
    assert "shards write folder: has no use for --window" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kind text: expected TextWindows for text"):
        WriteConfig(kind="text", source=tmp_path)
