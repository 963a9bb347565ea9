"""A tree of image files with one folder a class, as torchvision's ImageFolder reads it: ROOT/CLASS/.../IMAGE.

Labels number the sorted class names. Every file is taken for an image, whatever its name: what is none is a bad image
and falls under the policy for these, so that nothing is left out in silence. Links are followed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_write import safe_key
from data_pipelines.sources.listing import Listing


def list_samples(root: Path, split: str | None) -> Listing:
    """All images of the tree, sorted by class and name."""
    if split is not None:
        raise ValueError(
            f"split {split!r}: an image folder has none; name the folder of the split, as in {root / split}"
        )
    class_folders = sorted(entry for entry in _entries(root) if entry.is_dir())
    if not class_folders:
        raise ValueError(f"{root}: no folders in it, expected one for each class")
    prefix = os.path.join(root, "")  # noqa: PTH118 (with its slash)
    names: list[str] = []
    sizes: list[int] = []
    label: list[int] = []
    for index, folder in enumerate(class_folders):
        files = list(_walk(folder, (os.path.realpath(root),)))
        if not files:
            raise ValueError(f"{folder}: a class without images; fill the folder or remove it")
        for path, size in files:
            names.append(path.removeprefix(prefix))
            sizes.append(size)
            label.append(index)
    return Listing(
        class_names=[folder.name for folder in class_folders],
        paths=pack_strings(os.path.join(os.path.abspath(root), name) for name in names),  # noqa: PTH100, PTH118 (fast)
        path_of=np.arange(len(names), dtype=np.int32),
        offset=np.zeros(len(names), np.int64),
        length=np.array(sizes, np.int64),
        label=np.array(label, np.int32),
        keys=pack_strings(safe_key(os.path.splitext(name)[0]) for name in names),  # noqa: PTH122 (fast)
        names=pack_strings(names),
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except PermissionError:
        raise PermissionError(f"{folder}: cannot be read; change its permissions or remove it from the tree") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{folder}: not a folder") from None


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of all files below, sorted by name. `above`: the real paths of the folders on the way here."""
    here = os.path.realpath(folder)
    if here in above:
        raise ValueError(f"{folder}: a link to a folder above it, so the tree has no end; remove the link")
    _entries(folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, here))
            else:
                yield entry.path, _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{entry.path}: a link to a file that is not there; remove the link") from None
    except OSError as error:
        raise OSError(f"{entry.path}: {error.strerror}; remove it from the tree") from None
