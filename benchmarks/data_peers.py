"""Other loaders on the same JPEGs, each as its documentation shows it: RandomResizedCrop(224), flip, normalised floats.

They are no part of this project's environment, and need versions that exclude each other. So each runs in a process of
its own, which finds it in folders that `pip install --target FOLDER` filled, before the packages of the environment:
`python -m benchmarks.data --peer litdata FOLDER... --peer dali FOLDER...`. One that does not work is named with its
reason.
"""

import argparse
import gc
import importlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipelines.image.torchvision_door import torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32

Pipeline = Callable[[], Generator[int]]


def pillow_transform() -> Any:
    """torchvision's transforms on Pillow, as most examples use them."""
    transforms = torchvision.transforms
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def timm_loader(images: Path, _work: Path, *, is_recipe: bool = False) -> Pipeline:
    """timm's loader over the image folder, without workers; `is_recipe`: its RandAugment, erasing and mixing too."""
    # timm's own types take None for nothing.
    timm_data: Any = importlib.import_module("timm.data")
    # Levels end at 9: at 10 timm posterises to 0 bits, which Pillow 13 refuses.
    recipe = {"auto_augment": "rand-m9-mstd0.5-mmax9-inc1", "re_prob": 0.25, "re_mode": "pixel"} if is_recipe else {}
    mixup = timm_data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=1000) if is_recipe else None

    def run() -> Generator[int]:
        loader = timm_data.create_loader(
            timm_data.ImageDataset(str(images)),
            input_size=(3, 224, 224),
            batch_size=BATCH,
            is_training=True,
            use_prefetcher=False,
            num_workers=0,
            color_jitter=None,
            interpolation="bilinear",
            pin_memory=False,
            persistent_workers=False,
            **recipe,
        )
        while True:
            for pixels, labels in loader:
                yield len(mixup(pixels, labels)[0] if mixup else pixels)

    return run


def litdata_loader(images: Path, work: Path) -> Pipeline:
    """litdata's streaming dataset over chunks of JPEG bytes, shuffled, Pillow and torchvision."""
    litdata: Any = importlib.import_module("litdata")
    writer = litdata.streaming.writer.BinaryWriter(str(work / "litdata"), chunk_bytes=2**26)
    files = sorted(images.rglob("*.jpg"))
    for index, file in enumerate(files):
        writer.add_item(index, (file.read_bytes(), index % 10))
    writer.done()
    writer.merge()
    transform = pillow_transform()

    class Photos(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            data, label = super().__getitem__(index)
            return transform(_decoded(data)), label

    def run() -> Generator[int]:
        dataset = Photos(str(work / "litdata"), shuffle=True)
        while True:
            for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True):
                yield len(batch[0])

    return run


def mosaic_streaming(images: Path, work: Path) -> Pipeline:
    """mosaicml-streaming's dataset over MDS shards of JPEG bytes, shuffled, Pillow and torchvision."""
    streaming: Any = importlib.import_module("streaming")
    folder = str(work / "mds")
    with streaming.MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
        for index, file in enumerate(sorted(images.rglob("*.jpg"))):
            writer.write({"image": file.read_bytes(), "label": index % 10})
    transform = pillow_transform()

    class Photos(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(_decoded(sample["image"])), sample["label"]

    def run() -> Generator[int]:
        streaming.base.util.clean_stale_shared_memory()
        dataset = Photos(local=folder, shuffle=True, batch_size=BATCH)
        while True:
            for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True):
                yield len(batch[0])

    return run


def spdl_threads(images: Path, _work: Path) -> Pipeline:
    """spdl's decoding by FFmpeg, crop and resize as its filters; the boxes are torchvision's."""
    import spdl.io

    files = sorted(images.rglob("*.jpg"))
    crop = torchvision.transforms.RandomResizedCrop
    mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    shape_HW = torch.empty(1, 375, 500)

    def pixels(file: Path) -> Any:
        top, left, height, width = crop.get_params(shape_HW, [0.08, 1.0], [3 / 4, 4 / 3])
        flip = ",hflip" if torch.rand(()) < 0.5 else ""
        box = f"crop={width}:{height}:{left}:{top}:exact=1,scale=224:224:flags=bilinear{flip},format=rgb24"
        packets = spdl.io.demux_image(file.read_bytes())
        return spdl.io.to_numpy(spdl.io.convert_frames(spdl.io.decode_packets(packets, filter_desc=box)))

    def run() -> Generator[int]:
        while True:
            order = torch.randperm(len(files)).tolist()
            for start in range(0, len(order) - BATCH + 1, BATCH):
                batch_BHWC = np.stack([pixels(files[index]).reshape(224, 224, 3) for index in order[start:][:BATCH]])
                unit_BCHW = torch.from_numpy(batch_BHWC).permute(0, 3, 1, 2).float().div_(255)
                yield len(unit_BCHW.sub_(mean_C11).div_(std_C11))

    return run


def dali_cpu(images: Path, _work: Path) -> Pipeline:
    """DALI's operators on the CPU: fused decoding of a random crop, resize, flip and normalisation."""
    from nvidia.dali import fn, pipeline_def, types

    def photos() -> Any:
        data, labels = fn.readers.file(file_root=str(images), random_shuffle=True, name="reader")
        decoded = fn.decoders.image_random_crop(data, device="cpu", random_area=[0.08, 1.0])
        resized = fn.resize(decoded, size=[224, 224], interp_type=types.INTERP_TRIANGULAR)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(resized, mirror=mirror, mean=mean, std=std, output_layout="CHW"), labels

    define = pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)

    def run() -> Generator[int]:
        pipeline = define(photos)()
        pipeline.build()
        while True:
            batch, _ = pipeline.run()
            yield len(batch.as_array())

    return run


RECIPE_PEER = "timm's loader, RandAugment, erasing, Mixup"
# Name on the command line: name in the table, package whose version is filed, pipeline.
PEERS: dict[str, tuple[str, str, Callable[[Path, Path], Pipeline]]] = {
    "timm": ("timm's loader", "timm", timm_loader),
    "timm-recipe": (RECIPE_PEER, "timm", partial(timm_loader, is_recipe=True)),
    "litdata": ("litdata", "litdata", litdata_loader),
    "mosaicml-streaming": ("mosaicml-streaming", "mosaicml-streaming", mosaic_streaming),
    "spdl": ("spdl", "spdl_io", spdl_threads),
    "dali": ("DALI on the CPU", "nvidia-dali-cuda120", dali_cpu),
}


def cpu_rate(begin: Pipeline, seconds: float) -> float:
    """Images per second of processor time of this process, over at least `seconds` of a pipeline that starts afresh."""
    pipeline = begin()
    try:
        # The first batches fill the prefetch queue, which is as full at the end of the measurement.
        for _ in range(4):
            next(pipeline)
        # The garbage of starting up takes 0.2 s to find, and is nobody's work on images.
        gc.collect()
        start, count, used = time.process_time(), 0, 0.0
        while used < seconds:
            count += next(pipeline)
            used = time.process_time() - start
        return count / used
    finally:
        pipeline.close()


class PeerError(Exception):
    """A peer does not work here, and why."""


class Peer:
    """One of `PEERS` in a process of its own, with its `folders` before the packages of this environment."""

    def __init__(self, key: str, folders: list[Path], images: Path, work: Path) -> None:
        libraries = sorted({str(file.parent) for folder in folders for file in folder.glob("nvidia/*/lib*.so*")})
        paths = {
            "PYTHONPATH": [*(str(folder.resolve()) for folder in folders), os.environ.get("PYTHONPATH", "")],
            "LD_LIBRARY_PATH": [*libraries, os.environ.get("LD_LIBRARY_PATH", "")],
        }
        environment = os.environ | {name: os.pathsep.join(filter(None, values)) for name, values in paths.items()}
        command = [sys.executable, "-m", "benchmarks.data_peers", key, str(images), str(work)]
        self._log = (work / f"{key}.log").open("w+")
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.version = str(self._answer()["version"])
        except PeerError:
            self.close()
            raise

    def rate(self, seconds: float) -> float:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._answer()["rate"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Libraries print there too.
        for line in self._process.stdout:
            if line.startswith('{"answer"'):
                answer: dict[str, Any] = json.loads(line)["answer"]
                return answer
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
        raise PeerError(lines[-1][:200] if lines else f"ended with status {self._process.wait()}")


def main() -> None:
    """The process of one peer: its version, then a rate for each number of seconds on the standard input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_peers", description=main.__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("images", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    _, package, make = PEERS[args.peer]
    pipeline = make(args.images, args.work)
    # One batch, so that what fails at work is found before the measurement.
    next(pipeline())
    print(json.dumps({"answer": {"version": importlib.metadata.version(package)}}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"answer": {"rate": cpu_rate(pipeline, float(line))}}), flush=True)


if __name__ == "__main__":
    main()
