"""The maker of the sample data: the same number of each class, the first of each, and the same bytes every time."""

import os
import struct
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from checks import fashion_sample as maker
from data_pipelines.sources.idx import PREFIXES, read_idx
from tests.tiny import ROOT

pytestmark = pytest.mark.multi_process

# Of the made-up full set: images a split, of 4 x 4 pixels. The maker takes 10,000 and 2,000.
NUM_FULL = {"train": 10_500, "test": 2_300}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of a full set of ten classes in random order."""
    folder = tmp_path_factory.mktemp("full")
    generator = np.random.default_rng(0)
    for split, num_images in NUM_FULL.items():
        labels = generator.permutation(np.arange(num_images) % 10).astype(np.uint8)
        images_NHW = generator.integers(0, 256, (num_images, 4, 4), np.uint8)
        maker.write_idx(folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz", images_NHW)
        maker.write_idx(folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz", labels)
    return folder


def make(full: Path, target: Path) -> dict[str, bytes]:
    """The maker's files by name, made by its command."""
    command = [sys.executable, "-m", "checks.fashion_sample", str(full), str(target)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {file.name: file.read_bytes() for file in sorted(target.iterdir())}


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    prefix = folder / PREFIXES[split]
    return read_idx(Path(f"{prefix}-images-idx3-ubyte.gz")), read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"))


def test_the_sample_is_balanced_ordered_and_the_same_bytes_twice(full: Path, tmp_path: Path) -> None:
    made = make(full, tmp_path / "first")
    assert made == make(full, tmp_path / "second")
    assert sorted(made) == sorted(file.name for file in full.iterdir())
    for split, num_images in maker.NUM_IMAGES.items():
        images_NHW, labels = read_split(tmp_path / "first", split)
        assert images_NHW.shape == (num_images, 4, 4)
        assert np.bincount(labels).tolist() == [num_images // 10] * 10
        full_images_NHW, full_labels = read_split(full, split)
        # The plain twin: go through the full set and take an image while its class has room.
        taken, room = [], [num_images // 10] * 10
        for index, label in enumerate(full_labels.tolist()):
            if room[label]:
                room[label] -= 1
                taken.append(index)
        assert np.array_equal(images_NHW, full_images_NHW[taken]) and np.array_equal(labels, full_labels[taken])


@pytest.mark.parametrize("split", list(PREFIXES))
def test_the_sample_that_ships_is_balanced(split: str) -> None:
    images_NHW, labels = read_split(Path(str(files("data_pipelines") / "sample" / "fashion_mnist")), split)
    num_images = maker.NUM_IMAGES[split]
    assert images_NHW.shape == (num_images, 28, 28)
    assert np.bincount(labels).tolist() == [num_images // 10] * 10


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60).map(lambda labels: np.array([*labels, 3], np.uint8)),
    share=st.integers(0, 5),
)
def test_a_subset_is_balanced_or_refused(labels: NDArray[np.uint8], share: int) -> None:
    counts = np.bincount(labels, minlength=4)
    if counts.min() < share:
        with pytest.raises(ValueError, match="equal classes"):
            maker.balanced_subset(labels, 4 * share)
        return
    chosen = maker.balanced_subset(labels, 4 * share)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [share] * 4
    assert (np.diff(chosen) > 0).all()


def test_images_that_do_not_divide_among_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="7 images of 2 equal classes"):
        maker.balanced_subset(np.array([0, 1] * 10, np.uint8), 7)


def test_a_written_file_has_neither_time_nor_name(tmp_path: Path) -> None:
    maker.write_idx(tmp_path / "a.gz", np.arange(6, dtype=np.uint8).reshape(2, 3))
    data = (tmp_path / "a.gz").read_bytes()
    # Flags 0 say that no name follows; the time is four zero bytes (RFC 1952).
    assert data[3] == 0 and struct.unpack("<I", data[4:8]) == (0,)
    assert read_idx(tmp_path / "a.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
