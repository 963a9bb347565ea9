"""Small real shard sets for the tests of streaming: images in tars, opened through the index."""

import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.shards.index import ShardSet


def smooth_image(height: int, width: int, seed: int) -> np.ndarray[Any, Any]:
    """RGB pixels without sharp edges, so that JPEG and resizing keep them within a few grey levels."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorspace="RGB"))


def encoded(pixels: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    """Bytes of an image in Pillow's format `kind`."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


class TarShards:
    """What the loader needs of a shard set, over tars that are written here."""

    def __init__(self, folder: Path, images: Sequence[bytes], labels: Sequence[int], *, shard_size: int = 16) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_samples = len(images)
        self.num_classes = max(labels, default=0) + 1
        self.class_names = [str(label) for label in range(self.num_classes)]
        self.members: dict[str, Any] = {}
        self.is_text = self.is_pairs = False
        self.fingerprint = f"{zlib.crc32(b''.join(images)):064x}"
        self.shard_of = np.arange(len(images), dtype=np.int32) // shard_size
        self.num_shards = -(-len(images) // shard_size)
        self.shard_names = [f"shard-{shard:06d}.tar" for shard in range(self.num_shards)]
        self.label = np.array(labels, dtype=np.int32)
        self.length = np.array([len(image) for image in images], dtype=np.int64)
        self.crc = np.array([zlib.crc32(image) for image in images], dtype=np.uint32)
        self.offset = np.zeros(len(images), dtype=np.int64)
        for shard, name in enumerate(self.shard_names):
            self._write(folder / name, np.flatnonzero(self.shard_of == shard), images)

    def as_set(self) -> ShardSet:
        """Itself, as the type that the loader asks for: it has all that is read of it."""
        return cast(ShardSet, self)

    def _write(self, path: Path, indices: np.ndarray[Any, Any], images: Sequence[bytes]) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in indices.tolist():
                member = tarfile.TarInfo(f"{self.key(index)}.img")
                member.size = len(images[index])
                tar.addfile(member, io.BytesIO(images[index]))
        with tarfile.open(path) as tar:
            self.offset[indices] = [member.offset_data for member in tar.getmembers()]

    def key(self, index: int) -> str:
        return f"{index:08d}"


def grey_level_shards(folder: Path, num_samples: int, **options: Any) -> TarShards:
    """PNG images of 6 x 6 pixels; sample i is all of grey level i % 251, so pixels say which sample a row shows."""
    images = [encoded(np.full((6, 6, 3), i % 251, np.uint8), "PNG") for i in range(num_samples)]
    return TarShards(folder, images, [i % 10 for i in range(num_samples)], **options)
