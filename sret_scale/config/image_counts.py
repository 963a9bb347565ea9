"""Counts of images as people write them: 1281167, 10ep (epochs of the training set) or 5% (of train.total_images).

They become images where a configuration is made from text: what a run computes, and saves, holds images alone.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_COUNT = re.compile(r"(\d+\.?\d*|\.\d+) ?(ep|%)", re.ASCII)
_TOTAL = "train.total_images"


def take_texts(tree: dict[str, Any]) -> list[str]:
    """Remove counts that are text from a tree of sections: `section.field=text` of each."""
    taken = [(section, name) for section, name in _fields(tree) if isinstance(tree[section][name], str)]
    return [f"{section}.{name}={tree[section].pop(name)}" for section, name in taken]


def resolve_counts(tree: dict[str, Any], epoch_images: Callable[[], int]) -> None:
    """Put images in the place of every `10ep` and `5%` in the sections of a whole configuration.

    `epoch_images` gives the number of images in the training set. ValueError for other text.
    """
    for section, name in sorted(_fields(tree), key=lambda field: ".".join(field) != _TOTAL):
        key, value = f"{section}.{name}", tree[section][name]
        if not isinstance(value, str):
            continue
        match = _COUNT.fullmatch(value.strip())
        if match is None or (match[2] == "%" and key == _TOTAL):
            percent = "" if key == _TOTAL else f", or a part of {_TOTAL} (5%)"
            raise ValueError(f"{key}: expected images (1281167) or epochs (10ep){percent}, got {value!r}")
        whole = epoch_images() if match[2] == "ep" else tree["train"]["total_images"]
        if isinstance(whole, int | float) and abs(float(match[1]) * whole) < 2**63:
            images = round(float(match[1]) * whole / (1 if match[2] == "ep" else 100))
            # 0 has a meaning of its own in most fields.
            tree[section][name] = max(images, 1 if float(match[1]) else 0)


def describe_counts(tree: dict[str, Any], epoch_images: int) -> Iterator[str]:
    """A line for every count above 0: images, epochs, and its part of the run."""
    total = tree["train"]["total_images"]
    for section, name in _fields(tree):
        if images := tree[section][name]:
            part = "" if f"{section}.{name}" == _TOTAL else f", {images / total:.3g} of the run"
            yield f"{section}.{name}: {images:,} images = {images / epoch_images:.4g} epochs of {epoch_images:,}{part}"


def _fields(tree: dict[str, Any]) -> list[tuple[str, str]]:
    sections = [(section, fields) for section, fields in tree.items() if isinstance(fields, dict)]
    return [(section, name) for section, fields in sections for name in fields if _is_count(str(name))]


def _is_count(name: str) -> bool:
    """True for a length of a run; `num_images` of telemetry are a handful of one batch."""
    return name.endswith("_images") and name != "num_images"
