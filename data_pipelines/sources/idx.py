"""IDX files, the format of the MNIST family: one file of images, one of labels, plain or gzipped.

The pixels become PNG files, 8-bit grey. `classes.txt` beside them, one name a line, gives the class names.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.checked_files import open_regular
from data_pipelines.image.map_png import encode_png
from data_pipelines.shards.packed_strings import pack_strings
from data_pipelines.sources.listing import CLASSES_FILE, Listing, check_labels, numbered_class_names, read_class_names

PREFIXES = {"train": "train", "test": "t10k"}
_HEADS = [bytes([0, 0, 8, ndim]) for ndim in (1, 2, 3)]
_MOST_BYTES = 1 << 30  # twice the largest set of the family


def list_samples(folder: Path, split: str | None) -> Listing:
    """The images of one split ("train" or "test") of an IDX folder with the four standard file names."""
    if split is None or split not in PREFIXES:
        raise ValueError(f"split of IDX files: expected {' or '.join(PREFIXES)}, got {split!r}")
    images_path = _find(folder, f"{PREFIXES[split]}-images-idx3-ubyte")
    labels_path = _find(folder, f"{PREFIXES[split]}-labels-idx1-ubyte")
    images_NHW, label = read_idx(images_path), read_idx(labels_path).astype(np.int32)
    if images_NHW.ndim != 3 or label.shape != images_NHW.shape[:1]:
        raise ValueError(
            f"{labels_path}: expected one label for each image, got images {images_NHW.shape} and labels {label.shape}"
        )
    num_samples = len(label)
    if not num_samples:
        raise ValueError(f"{images_path}: no images in it; get the file again")
    names_path = folder / CLASSES_FILE
    if names_path.exists():
        class_names = read_class_names(names_path)
    else:
        class_names = numbered_class_names(int(label.max()), labels_path)
    check_labels(label, class_names, labels_path)
    keys = [f"{split}-{index:06d}" for index in range(num_samples)]
    image_bytes = images_NHW[0].size
    return Listing(
        class_names=class_names,
        paths=pack_strings([str(images_path)]),
        path_of=np.zeros(num_samples, np.int32),
        offset=np.arange(num_samples, dtype=np.int64) * image_bytes,
        length=np.full(num_samples, image_bytes, np.int64),
        label=label,
        keys=pack_strings(keys),
        names=pack_strings(f"{images_path.name}[{index}]" for index in range(num_samples)),
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes. Raises ValueError when it is another format, too large or cut off."""
    with open_regular(path) as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if head in _HEADS else b""
            if not sizes or len(sizes) < 4 * head[3]:
                raise ValueError(
                    f"{path}: not an IDX file of unsigned bytes in 1 to 3 dimensions (it begins with {head.hex()})"
                )
            shape = struct.unpack(f">{head[3]}I", sizes)
            num_bytes = math.prod(shape)
            if num_bytes > _MOST_BYTES:
                raise ValueError(
                    f"{path}: its header says {shape}, {num_bytes:,} bytes; at most {_MOST_BYTES:,} are read"
                )
            # A byte more than wanted shows a file that is too long, and no more of a packed one is unpacked.
            data = file.read(num_bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); get the file again") from error
    if len(data) != num_bytes:
        found = f"{len(data):,}" if len(data) < num_bytes else f"more than {num_bytes:,}"
        raise ValueError(f"{path}: {found} bytes of content, its header says {shape}; get the file again")
    return np.frombuffer(data, np.uint8).reshape(shape)


class IdxReader:
    """Images of IDX files as PNG."""

    def __init__(self) -> None:
        self._images: dict[str, NDArray[np.uint8]] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._images:
            self._images[path] = read_idx(Path(path))
        images_NHW = self._images[path]
        return encode_png(images_NHW[offset // length])


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{folder / name}: no such file, with or without .gz; name the folder that holds the four IDX files"
    )
