"""The ILSVRC 2012 classification tars as they are distributed, read in place.

    ILSVRC2012_img_train.tar            a tar of 1000 class tars, n01440764.tar ...
    ILSVRC2012_img_val.tar              50,000 images, whose classes are in the development kit:
    ILSVRC2012_devkit_t12.tar.gz        class numbers of the validation images, and which synset each number means
    or imagenet_2012_validation_synset_labels.txt    instead of the kit: one synset a line, in the order of the images

Labels number the sorted synset names (n01440764 is 0), as torchvision and timm do; the kit's own numbers differ.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.checked_files import open_regular, read_bounded
from data_pipelines.extras import install_packages
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.shards.tar_scan import Member, TarError, mapped, scan_members, split_name
from data_pipelines.shards.tar_write import safe_key
from data_pipelines.sources.listing import Listing

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = "imagenet_2012_validation_synset_labels.txt"


def list_samples(folder: Path, split: str | None) -> Listing:
    """The images of split "train" or "val"."""
    if split == "train":
        path = _existing(folder, TRAIN_TAR)
        found = [(member, synset) for synset, member in _train_members(path)]
    elif split == "val":
        path = _existing(folder, VAL_TAR)
        members = sorted(_members(path), key=lambda member: member.name)
        found = list(zip(members, _validation_synsets(folder, len(members)), strict=True))
    else:
        raise ValueError(f"split of ILSVRC 2012: expected train or val, got {split!r}")
    if not found:
        raise ValueError(f"{path}: no images in it")
    class_names = sorted({synset for _, synset in found})
    number = {name: index for index, name in enumerate(class_names)}
    prefix = split == "train"
    return Listing(
        class_names=class_names,
        paths=pack_strings([str(path.resolve())]),
        path_of=np.zeros(len(found), np.int32),
        offset=np.array([member.offset for member, _ in found], np.int64),
        length=np.array([member.size for member, _ in found], np.int64),
        label=np.array([number[synset] for _, synset in found], np.int32),
        keys=pack_strings(safe_key((split_name(member.name) or ("",))[0]) for member, _ in found),
        names=pack_strings(f"{synset}.tar/{member.name}" if prefix else member.name for member, synset in found),
    )


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder / name}: no such file; get it from image-net.org, unpacking is not needed")
    return folder / name


def _members(path: Path) -> list[Member]:
    with mapped(path) as data:
        try:
            return [member for member in scan_members(data) if split_name(member.name)]
        except TarError as error:
            raise ValueError(f"{path}: at offset {error.offset}: {error.reason}; get the file again") from error


def _train_members(path: Path) -> Iterator[tuple[str, Member]]:
    """(synset, image) of the train tar; offsets count from the start of the outer tar."""
    for outer in _members(path):
        synset = outer.name.removesuffix(".tar")
        with mapped(path) as data, data[outer.offset : outer.offset + outer.size] as inner:
            try:
                for image in scan_members(inner):
                    if not split_name(image.name):
                        continue
                    start, offset = outer.offset + image.start, outer.offset + image.offset
                    yield synset, Member(name=image.name, start=start, offset=offset, size=image.size)
            except TarError as error:
                place = f"at offset {outer.offset + error.offset}, in {outer.name}"
                raise ValueError(f"{path}: {place}: {error.reason}; get the file again") from error


def _validation_synsets(folder: Path, num_images: int) -> list[str]:
    """The synset of each validation image, in the order of their names."""
    if (folder / VAL_LABELS).exists():
        where = folder / VAL_LABELS
        synsets = read_bounded(where).decode("utf-8-sig", errors="replace").split()
    elif (folder / DEVKIT).exists():
        where = folder / DEVKIT
        synsets = _devkit_synsets(where)
    else:
        raise FileNotFoundError(f"{folder}: neither {DEVKIT} nor {VAL_LABELS}; one of them is needed for the labels")
    if len(synsets) != num_images:
        raise ValueError(f"{where}: labels of {len(synsets):,} images, but the tar has {num_images:,}; get both again")
    return synsets


def _devkit_synsets(path: Path) -> list[str]:
    """The synsets of the validation images by the development kit: its meta.mat says what its numbers mean."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{path}: reading the kit's meta.mat needs scipy; {install_packages('scipy')}") from None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file) as kit:
            content = {Path(member.name).name: member for member in kit.getmembers() if member.isfile()}
            truth = _content(kit, content["ILSVRC2012_validation_ground_truth.txt"]).decode("ascii").split()
            table: Any = loadmat(io.BytesIO(_content(kit, content["meta.mat"])), squeeze_me=True)["synsets"]
    except (KeyError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not the development kit or a broken one ({error}); get the file again") from error
    synset = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in table}
    unknown = sorted(set(truth) - set(synset))
    if unknown:
        raise ValueError(f"{path}: class number {unknown[0]!r} is not in its meta.mat; get the file again")
    return [synset[number] for number in truth]


def _content(kit: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = kit.extractfile(member)
    assert file is not None, member.name
    return file.read()
