"""A tree of image files with one folder a class, as torchvision's ImageFolder reads it: ROOT/CLASS/.../IMAGE.

With label maps beside the images (a.png, a.map.png) the folders are no classes: ROOT/classes.txt names the labels.

Labels number the sorted class names. Every file is taken for an image, whatever its name: what is none is a bad image
and falls under the policy for these, so that nothing is left out in silence. Links are followed. What is hidden, or
what systems leave beside images, is passed over and named.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.image.map_png import MAP_MEMBER
from data_pipelines.keyed_random import keyed_permutation
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_write import safe_key
from data_pipelines.sources.listing import CLASSES_FILE, Listing, read_class_names
from data_pipelines.sources.ranges import member_path

logger = logging.getLogger(__name__)

_JUNK = (
    ".ds_store",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "@eadir",
    "__macosx",
    "$recycle.bin",
    "system volume information",
)
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def list_samples(root: Path, split: str | None) -> Listing:
    """All images of the tree, sorted by class and name; or one part of them, as `split_name` writes it."""
    part = None if split is None else re.fullmatch(r"(train|val):([0-9.e-]+):(-?[0-9]+)", split)
    if split is not None and part is None:
        raise ValueError(
            f"split {split!r}: an image folder has none; name the folder of the split, as in {root / split}, or give "
            "the share of the images that is kept for validation, as in --split 0.1"
        )
    passed_over: list[str] = []
    class_folders = sorted(
        entry for entry in _entries(root) if entry.is_dir() and not _is_junk(entry, entry.name, passed_over)
    )
    if not class_folders:
        raise ValueError(f"{root}: no folders in it, expected one for each class")
    names_of_splits = [folder.name for folder in class_folders if folder.name.lower() in _SPLITS]
    if len(names_of_splits) == len(class_folders):
        logger.warning(
            "%s: its classes are called %s: where these are splits, write each by itself, as in %s",
            *(root, " and ".join(names_of_splits), root / names_of_splits[0]),
        )
    prefix = os.path.join(root, "")  # noqa: PTH118 (with its slash)
    names: list[str] = []
    sizes: list[int] = []
    label: list[int] = []
    for index, folder in enumerate(class_folders):
        files = list(_walk(folder, (os.path.realpath(root),), passed_over))
        if not files:
            raise ValueError(f"{folder}: a class without images; fill the folder or remove it")
        for path, size in files:
            names.append(path.removeprefix(prefix))
            sizes.append(size)
            label.append(index)
    if passed_over:
        shown = ", ".join(map(repr, passed_over[:3])) + (", ..." if len(passed_over) > 3 else "")
        logger.warning("%s: passed over %d hidden or system entries: %s", root, len(passed_over), shown)
    class_names = [folder.name for folder in class_folders]
    rows = _with_maps(root, names)
    has_maps = len(rows) < len(names)
    if part is not None:
        chosen = _in_validation([label[row] for row in rows], class_names, float(part[2]), int(part[3]))
        rows = [row for row, is_val in zip(rows, chosen, strict=True) if is_val == (part[1] == "val")]
        if not rows:
            raise ValueError(f"{root}: no images for validation at a share of {part[2]}; give a larger one")
    names, sizes, label = [names[row] for row in rows], [sizes[row] for row in rows], [label[row] for row in rows]
    if has_maps:
        if not (file := root / CLASSES_FILE).exists():
            raise FileNotFoundError(f"{file}: missing; name the labels of the maps in it, one a line, 0 first")
        class_names, label = read_class_names(file), [0] * len(label)
    return Listing(
        class_names=class_names,
        paths=pack_strings(os.path.join(os.path.abspath(root), name) for name in names),  # noqa: PTH100, PTH118 (fast)
        path_of=np.arange(len(names), dtype=np.int32),
        offset=np.zeros(len(names), np.int64),
        length=np.array(sizes, np.int64),
        label=np.array(label, np.int32),
        keys=pack_strings(safe_key(os.path.splitext(name)[0]) for name in names),  # noqa: PTH122 (fast)
        names=pack_strings(names),
        members=[MAP_MEMBER] if has_maps else [],
    )


def _with_maps(root: Path, names: Sequence[str]) -> list[int]:
    """The rows that are images and no label maps. Raises ValueError for a map of no image."""
    rows = [row for row, name in enumerate(names) if not name.endswith(f".{MAP_MEMBER}")]
    if len(rows) < len(names):
        orphans = set(names) - {names[row] for row in rows} - {member_path(names[row], MAP_MEMBER) for row in rows}
        if orphans:
            raise ValueError(f"{root / min(orphans)}: a map without an image; remove it, or add the image")
    return rows


def split_name(part: str, share: str, seed: int) -> str:
    """The split of an image folder that keeps `share` of each class for validation; part: "train" or "val"."""
    return f"{part}:{share}:{seed}"


def _in_validation(label: Sequence[int], class_names: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Which images are kept for validation: the share of each class, drawn by name of the class, never all of it."""
    labels, chosen = np.array(label), np.zeros(len(label), np.bool_)
    for index, name in enumerate(class_names):
        rows = np.flatnonzero(labels == index)
        number = min(round(share * len(rows)), len(rows) - 1)
        chosen[rows[keyed_permutation(len(rows), "split", seed, ascii(name))[:number]]] = True
    return chosen


def _is_junk(entry: Path | os.DirEntry[str], shown: str, passed_over: list[str]) -> bool:
    """Whether it is no image of anybody's: then it is put down under `shown`. A file may begin with a dot."""
    is_hidden = entry.name.startswith("._") or (entry.name.startswith(".") and entry.is_dir())
    is_junk = is_hidden or entry.name.lower() in _JUNK
    if is_junk:
        passed_over.append(shown)
    return is_junk


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except PermissionError:
        raise PermissionError(f"{folder}: cannot be read; change its permissions or remove it from the tree") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{folder}: not a folder") from None


def _walk(folder: Path, above: tuple[str, ...], passed_over: list[str]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of all files below, sorted by name. `above`: the real paths of the folders on the way here."""
    here = os.path.realpath(folder)
    if here in above:
        raise ValueError(f"{folder}: a link to a folder above it, so the tree has no end; remove the link")
    _entries(folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_junk(entry, entry.path, passed_over):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, here), passed_over)
            else:
                yield entry.path, _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        found = entry.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{entry.path}: a link to a file that is not there; remove the link") from None
    except OSError as error:
        raise OSError(f"{entry.path}: {error.strerror}; remove it from the tree") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{entry.path}: expected a regular file, got a pipe, socket or device; remove it from the tree"
        )
    return found.st_size
