"""Makes the Fashion-MNIST sample from the full set:

    python -m checks.fashion_sample FOLDER_WITH_THE_FOUR_IDX_FILES TARGET_FOLDER

The first images of each class, the same number of each, in the order of the full set. The same bytes every time.
"""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sources.idx import PREFIXES, read_idx

NUM_IMAGES = {"train": 10_000, "test": 2_000}


def balanced_subset(labels: NDArray[np.uint8], num_images: int) -> NDArray[np.int64]:
    """Indices, ascending, of the first `num_images` / classes images of each class."""
    num_classes = int(labels.max()) + 1
    share, rest = divmod(num_images, num_classes)
    counts = np.bincount(labels)
    if rest or counts.min() < share:
        raise ValueError(f"{num_images} images of {num_classes} equal classes: got {counts.tolist()} images")
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:share] for label in range(num_classes)]))


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Writes a gzipped IDX file, without time or name in its header."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m checks.fashion_sample", description=(__doc__ or "").split(":")[0])
    parser.add_argument("source", type=Path, help="folder with the four IDX files of the full set")
    parser.add_argument("target", type=Path, help="folder for the four files of the sample")
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    for split, prefix in PREFIXES.items():
        names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
        images_NHW, labels = (read_idx(args.source / name) for name in names)
        chosen = balanced_subset(labels, NUM_IMAGES[split])
        for name, array in zip(names, (images_NHW, labels), strict=True):
            write_idx(args.target / name, array[chosen])


if __name__ == "__main__":
    main()
