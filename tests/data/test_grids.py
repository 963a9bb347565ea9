"""Mazes and products against slow twins, and `shards write` of them: the same bytes however they are made."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.grids.made import GridOptions, GridReader, list_grids
from data_pipelines.grids.mazes import MARGIN
from data_pipelines.grids.products import GROUPS, group_table
from data_pipelines.image.decode import decode_rgb
from data_pipelines.image.map_png import decode_map
from data_pipelines.shards.index import open_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig
from sret_scale.cli import main
from tests.data.shard_sources import members_of
from tests.reference import mazes as slow

Array = slow.Array
SIDES = st.sampled_from([7, 9, 15, 21])
BRAIDS = st.sampled_from([0.0, 0.1, 0.5])


def samples(puzzle: str, side: int, count: int = 2, **options: Any) -> list[dict[str, Array]]:
    """Image (3, H, W), map and attributes of each sample, read as a writer of shards reads them."""
    made = GridOptions(puzzle=puzzle, count=count, smallest=side, largest=side, **options)  # type: ignore[arg-type]
    listing, reader = list_grids(made), GridReader()
    found = []
    for index in range(count):
        stem = listing.paths[0].removesuffix(".png")
        parts = {name: reader.read(f"{stem}.{name}", index, -1) for name in listing.members}
        maps = {name[:-4]: decode_map(data, name, side, side, len(listing.class_names)) for name, data in parts.items()}
        found.append({"image": decode_rgb(reader.read(listing.paths[0], index, 1)).numpy(), **maps})
    return found


@settings(max_examples=15, deadline=None)
@given(SIDES, BRAIDS, st.integers(0, 1 << 40))
def test_reach_tells_what_a_search_finds(side: int, braid: float, seed: int) -> None:
    for sample in samples("reach", side, braid=braid, seed=seed):
        free_HW, source, target = slow.places(sample["image"])
        slow.check_shape(free_HW)
        found_HW = slow.distances(free_HW, source)
        assert target is None and np.array_equal(sample["distance"], found_HW)
        asked_HW = free_HW.copy()
        asked_HW[source] = False
        assert np.array_equal(sample["map"], np.where(asked_HW, found_HW < slow.UNREACHED, 255))
        cells = (side // 2) ** 2
        closed = np.argwhere(~free_HW & (sample["before"] < slow.UNREACHED)).tolist()
        assert len(closed) == 1 and (braid or slow.num_edges(free_HW) == cells - 2)
        free_HW[tuple(closed[0])] = True
        assert np.array_equal(sample["before"], slow.distances(free_HW, source))
        assert (slow.distances(free_HW, source) < slow.UNREACHED).sum() == free_HW.sum()


@settings(max_examples=15, deadline=None)
@given(SIDES, BRAIDS, st.integers(0, 1 << 40))
def test_a_path_is_every_shortest_way(side: int, braid: float, seed: int) -> None:
    for sample in samples("path", side, braid=braid, seed=seed):
        free_HW, source, target = slow.places(sample["image"])
        slow.check_shape(free_HW)
        assert target is not None and target != source
        there_HW, back_HW = slow.distances(free_HW, source), slow.distances(free_HW, target)
        assert np.array_equal(sample["distance"], there_HW)
        assert np.array_equal(sample["map"], np.where(free_HW, there_HW + back_HW == there_HW[target], 255))
        assert braid or (sample["map"] == 1).sum() == there_HW[target] + 1


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([11, 15, 21]), BRAIDS.filter(lambda braid: braid < 0.5), st.integers(0, 1 << 40))
def test_twins_differ_in_one_passage_each_alike_and_far_from_the_target(side: int, braid: float, seed: int) -> None:
    ours = samples("twins", side, count=4, braid=braid, seed=seed)
    for pair in (ours[:2], ours[2:]):
        (first_HW, source, target), other = slow.places(pair[0]["image"]), slow.places(pair[1]["image"])
        assert other[1:] == (source, target) and target is not None
        whole_HW = first_HW | other[0]
        slow.check_shape(whole_HW)
        before_HW = slow.distances(whole_HW, source)
        cut, away = [], []
        for label, (sample, free_HW) in enumerate(zip(pair, (first_HW, other[0]), strict=True)):
            found_HW = slow.distances(free_HW, source)
            assert np.array_equal(sample["distance"], found_HW) and np.array_equal(sample["before"], before_HW)
            assert (found_HW[target] < slow.UNREACHED) == label == sample["map"][target]
            assert (sample["map"] != 255).sum() == 1
            [closed] = [(row, column) for row, column in np.argwhere(whole_HW & ~free_HW).tolist()]
            assert sum(closed) % 2 and slow.apart(closed, target) > MARGIN and slow.apart(closed, source) > 1
            cut.append(int((free_HW & (found_HW == slow.UNREACHED)).sum()))
            away.append(slow.apart(closed, target))
        assert min(cut) > 0 and all(4 * (max(numbers) - min(numbers)) <= max(numbers) for numbers in (cut, away))


def test_no_twins_are_looked_for_for_ever() -> None:
    with pytest.raises(ValueError, match=r"no twins in 1,000 mazes of 5 pixels, braid 0: make larger ones"):
        samples("twins", 5)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["z2", "s3", "a5"]), st.integers(1, 8), st.booleans(), st.integers(0, 1 << 40))
def test_products_are_those_of_matrices(group: str, side: int, snake: bool, seed: int) -> None:
    elements = list(group_table(group))
    assert (len(elements), elements) == ({"z2": 2, "s3": 6, "a5": 60}[group], sorted(elements))
    for sample in samples(group, side, snake=snake, seed=seed):
        line = [(row, column) for row in range(side) for column in range(side)]
        if snake:
            line = [(row, side - 1 - column if row % 2 else column) for row, column in line]
        assert [int(sample["position"][place]) for place in line] == list(range(side * side))
        assert (sample["image"].sum(0) == 255).all()
        symbols = [int(sample["image"][:, row, column].argmax()) for row, column in line]
        products = slow.product_labels(symbols, list(GROUPS[group]))
        assert [elements[sample["map"][place]] for place in line] == products


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"puzzle": "flood"}, "puzzle 'flood': expected one of reach, twins, path, z2, s3, a5"),
        ({"smallest": 8}, "size 8-15: expected odd numbers from 5 to 255 for reach"),
        ({"smallest": 17}, "size 17-15: expected odd numbers"),
        ({"puzzle": "s3", "largest": 256}, "size 7-256: expected numbers from 1 to 255 for s3"),
        ({"count": 0}, "count 0: expected 1 or more"),
        ({"puzzle": "twins", "count": 3}, "count 3: expected 1 or more, and an even number of twins"),
        ({"braid": 1.5}, "braid 1.5, snake False: expected 0 to 1 of mazes, a snake of products"),
        ({"puzzle": "z2", "braid": 0.5}, "braid 0.5, snake False"),
        ({"snake": True}, "braid 0, snake True"),
    ],
)
def test_options_that_make_nothing_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        GridOptions(**{"puzzle": "reach", "count": 2, "smallest": 7, "largest": 15, **changes})


def test_a_kind_and_what_it_is_made_of_belong_together() -> None:
    made = GridOptions(puzzle="reach", count=2, smallest=7, largest=7)
    for kind, source in (("folder", made), ("mazes", Path("here"))):
        with pytest.raises(ValueError, match="expected GridOptions for mazes and products, a path for other kinds"):
            WriteConfig(kind=kind, source=source)


def digest(folder: Path) -> str:
    """Of all files of a set."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@pytest.mark.multi_process
def test_the_command_makes_the_same_bytes_with_any_number_of_workers_and_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, *words: str) -> Path:
        options = ["--puzzle", "twins", "--size", "9-11", "--seed", "11", "--shard-samples", "6"]
        assert main(["shards", "write", "mazes", str(tmp_path / name), *options, *words]) == 0
        return tmp_path / name

    one, two = write("one", "--count", "20", "--workers", "1"), write("two", "--count", "20", "--workers", "2")
    assert "one: 20 samples of 2 classes in 4 shards" in capsys.readouterr().out
    assert digest(one) == digest(two) and verify_shards(one) == []
    more = members_of(write("more", "--count", "24", "--workers", "1"), "png")
    few = members_of(one, "png")
    assert few and all(more[name] == data for name, data in few.items())
    shards = open_shards(one)
    # Twins stand together, in the order of their numbers.
    assert list(shards.keys) == [f"twins-{index:06d}" for index in range(20)]
    assert shards.label.tolist() == [0, 1] * 10 and shards.class_names == ["unreached", "reached"]
    assert set(shards.width.tolist()) == {9, 11} and shards.width[::2].tolist() == shards.width[1::2].tolist()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mazes T --count 2", "shards write mazes: expected --count and --puzzle, one of reach, twins, path"),
        ("mazes T --puzzle reach", "shards write mazes: expected --count and --puzzle"),
        ("products T --puzzle reach --count 2", "shards write products: .* --puzzle, one of z2, s3, a5"),
        ("mazes T --puzzle reach --count 2 --size wide", "--size wide: expected a number of pixels, or two as in 7-15"),
        ("mazes S T --puzzle reach --count 2", "shards write mazes: expected one folder, TARGET"),
        ("folder S", "shards write folder: expected SOURCE and TARGET"),
        ("mazes T --puzzle reach --count 2 --split val", "shards write mazes: has no use for --split; leave that out"),
        ("folder S T --count 5 --snake", "shards write folder: has no use for --count --snake; leave that out"),
        ("mazes T --puzzle reach --count 2 --resize 5", "images with label maps are not resized; leave out --resize"),
    ],
)
def test_a_wrong_command_is_told_what_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["shards", "write", *words.split(), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error) and not list(tmp_path.iterdir())
