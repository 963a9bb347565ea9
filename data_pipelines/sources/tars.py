"""Existing webdataset shards, ours or others': a folder of tars, each sample an image member and a `.cls` label.

Images are read where they lie in the tars. Of shards with a manifest the class names are kept; otherwise `classes.txt`
in the folder, one name a line, gives them, or else the labels are their own names. A `.json` member is kept as it is,
and where the first sample has a label map (`.map.png`), so are it and attributes (`.NAME.png`).
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipelines.image.map_png import MAP_MEMBER
from data_pipelines.shards.manifest import MANIFEST_NAME, read_manifest
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_scan import Member, TarError, TarSample, describe_passed_over, mapped, scan_samples
from data_pipelines.shards.tar_write import is_safe_key, safe_key
from data_pipelines.sources.listing import CLASSES_FILE, Listing, check_labels, numbered_class_names, read_class_names
from data_pipelines.sources.ranges import WHOLE, RangeReader

logger = logging.getLogger(__name__)

_LONGEST_LABEL = 32  # bytes: digits, with space around them
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


def list_samples(folder: Path, split: str | None) -> Listing:
    """All samples of the tars in `folder`, in the order of the sorted tar names."""
    if split is not None:
        raise ValueError(f"split {split!r}: a folder of tars has none; name the folder that holds the split's tars")
    paths = tar_paths(folder)
    path_of: list[int] = []
    keys: list[str] = []
    images: list[Member] = []
    metadata: list[Member | None] = []
    labels: list[int] = []
    members: list[str] = []
    passed_over: Counter[str] = Counter()
    for number, path in enumerate(paths):
        with mapped(path) as data:
            try:
                for sample in scan_samples(data, passed_over):
                    if not keys and MAP_MEMBER in sample.members:
                        members = [name for name in sample.members if re.fullmatch(r"[a-z0-9_]{1,32}\.png", name)]
                    path_of.append(number)
                    keys.append(sample.key)
                    images.append(image_member(sample))
                    metadata.append(sample.members.get("json"))
                    labels.append(label_of(sample, data))
            except TarError as error:
                raise ValueError(f"{path}: at offset {error.offset}: {error.reason}; get the file again") from error
    if passed_over:
        logger.warning("%s: %s", folder, describe_passed_over(passed_over))
    label = np.array(labels, np.int32)
    class_names = class_names_of(folder, labels)
    check_labels(label, class_names, folder)
    # A linked tar by its own name, by which the members beside an image are read: its target may have any.
    return Listing(
        class_names=class_names,
        paths=pack_strings(str(path.absolute()) for path in paths),
        path_of=np.array(path_of, np.int32),
        offset=np.array([image.offset for image in images], np.int64),
        length=np.array([image.size for image in images], np.int64),
        label=label,
        keys=pack_strings(key if is_safe_key(key) else safe_key(key) for key in keys),
        names=pack_strings(f"{paths[number].name}/{image.name}" for number, image in zip(path_of, images, strict=True)),
        metadata_offset=np.array([part.offset if part else 0 for part in metadata], np.int64),
        metadata_length=np.array([part.size if part else 0 for part in metadata], np.int64),
        members=members,
    )


class TarReader(RangeReader):
    """Images in tars, and the members beside them."""

    def __init__(self) -> None:
        super().__init__()
        # Tar -> where its images begin -> the members of that sample.
        self._samples = lru_cache(maxsize=2)(_samples_by_image)

    def read(self, path: str, offset: int, length: int) -> bytes:
        if length != WHOLE:
            return super().read(path, offset, length)
        stem, name, ending = path.rsplit(".", 2)
        place = self._samples(f"{stem}.tar")[offset].get(f"{name}.{ending}")
        return super().read(f"{stem}.tar", place.offset, place.size) if place else b""


def _samples_by_image(path: str) -> dict[int, dict[str, Member]]:
    with mapped(Path(path)) as data:
        return {image_member(sample).offset: sample.members for sample in scan_samples(data)}


def tar_paths(folder: Path) -> list[Path]:
    """The tars of a folder, sorted. Raises FileNotFoundError when there is none."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no .tar files in it; name the folder that holds the shards")
    return paths


def image_member(sample: TarSample) -> Member:
    """The sample's image. Raises TarError unless there is exactly one."""
    images = [sample.members[ending] for ending in IMAGE_ENDINGS if ending in sample.members]
    if len(images) != 1:
        endings = ", ".join(sample.members)
        hint = "; texts are not indexed: write them again" if {"txt", "source"} & sample.members.keys() else ""
        raise TarError(
            sample.start, f"sample {sample.key!r} has {len(images)} images, expected one (members: {endings}){hint}"
        )
    return images[0]


def label_of(sample: TarSample, data: memoryview) -> int:
    """The label in the sample's `.cls`. Raises TarError without a whole number there."""
    if "cls" not in sample.members:
        raise TarError(sample.start, f"sample {sample.key!r} has no label (.cls)")
    member = sample.members["cls"]
    text = bytes(data[member.offset : member.offset + min(member.size, _LONGEST_LABEL + 1)])
    if len(text) > _LONGEST_LABEL or not text.strip().isdigit() or int(text) >= 1 << 31:
        raise TarError(member.offset, f"label {text[:20]!r} of sample {sample.key!r}, expected a whole number from 0")
    return int(text)


def class_names_of(folder: Path, labels: Sequence[int]) -> list[str]:
    """Class names of a folder of tars: from its manifest, from classes.txt, or the numbers up to the largest label."""
    if (folder / MANIFEST_NAME).exists():
        return read_manifest(folder).class_names
    if (folder / CLASSES_FILE).exists():
        return read_class_names(folder / CLASSES_FILE)
    return numbered_class_names(max(labels, default=-1), folder)
