"""Speed of the training pipeline beside its peers, on the same photos: `python -m benchmarks.data`.

Every pipeline goes from stored JPEGs to a normalised float batch of RandomResizedCrop(224) and flips, bilinear and
antialiased, on one core. Figures are images per second of processor time of the whole process (threads included),
because the machine may be shared; pipelines take turns, and the best of the rounds counts for each.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from skimage import data as photos
from sklearn.datasets import load_sample_images

from benchmarks.data_peers import BATCH, MEAN, PEERS, STD, available_peers, pillow_transform
from data_pipelines import roi
from data_pipelines.augment import AugmentConfig, BatchAugment, normalise_
from data_pipelines.config import DataConfig
from data_pipelines.index import ShardSet, open_shards
from data_pipelines.keyed import keyed_permutation
from data_pipelines.loader import LoaderState, TrainLoader
from data_pipelines.reader import ShardReader
from data_pipelines.write import WriteConfig, write_shards


def write_photos(folder: Path, num_images: int) -> None:
    """JPEGs of 500 x 375 pixels, quality 90, cut from the photos of scikit-image and scikit-learn; 10 class folders."""
    sources = [photos.astronaut(), photos.chelsea(), photos.coffee(), photos.rocket(), *load_sample_images().images]
    generator = np.random.default_rng(0)
    for index in range(num_images):
        image = Image.fromarray(sources[index % len(sources)])
        scale = generator.uniform(0.6, 1.0)
        width = int(min(image.width, image.height * 4 / 3) * scale)
        height = width * 3 // 4
        left, top = (int(generator.uniform(0, side)) for side in (image.width - width, image.height - height))
        view = image.resize((500, 375), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        pixels: NDArray[np.uint8] = np.asarray(view)
        path = folder / f"class-{index % 10}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "420"))


def ours(shards: ShardSet) -> Iterator[int]:
    """This project's loader, and its normalisation."""
    config = DataConfig(workers=1, prefetch_batches=1, interpolation="bilinear")
    sizes = {"micro_batch_size": BATCH, "grad_accum_steps": 1}
    loader = TrainLoader(shards, config, image_size=224, seed=0, rank=0, world_size=1, **sizes)
    plain = AugmentConfig(randaugment_ops=0, erase_rate=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)
    augment = BatchAugment(plain, shards.num_classes)
    for step in loader.steps(LoaderState()):
        batch = step.micro_batches[0]
        unit_BCHW, _ = augment(batch.images, batch.labels, seed=0)
        yield len(normalise_(unit_BCHW, MEAN, STD))


def webdataset_pillow(shards: ShardSet) -> Iterator[int]:
    """webdataset's own pipeline: shuffle buffer, Pillow, torchvision's transforms as in its examples."""
    transform = pillow_transform()
    urls = [str(shards.folder / name) for name in shards.shard_names]
    while True:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(100).decode("pil")
        for batch in dataset.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH, partial=False):
            yield len(batch[0])


def reads_in_random_order(shards: ShardSet) -> Iterator[int]:
    """Index and pread, every checksum compared."""
    with ShardReader(shards) as reader:
        while True:
            for index in keyed_permutation(shards.num_samples, "benchmark").tolist():
                reader.read(index)
                yield 1


def reads_by_webdataset(shards: ShardSet) -> Iterator[int]:
    """webdataset's sequential reader, nothing decoded."""
    urls = [str(shards.folder / name) for name in shards.shard_names]
    while True:
        for _ in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            yield 1


def best_rates(pipelines: dict[str, Callable[[], Iterator[int]]], num_images: int, rounds: int) -> dict[str, float]:
    """Images per second of processor time. Each round starts afresh, so that nothing is prepared in another's turn."""
    best = dict.fromkeys(pipelines, 0.0)
    for _ in range(rounds):
        for name, begin in pipelines.items():
            with contextlib.closing(begin()) as pipeline:  # type: ignore[type-var]
                # The first batches fill the prefetch queue, which is as full at the end of the measurement.
                for _ in range(4):
                    next(pipeline)
                start, count = time.process_time(), 0
                while count < num_images:
                    count += next(pipeline)
                best[name] = max(best[name], count / (time.process_time() - start))
    return best


def memory_growth_bytes(shards: ShardSet, num_epochs: int) -> dict[str, int]:
    """Resident memory after the fifth epoch of a small set, and how much more it is after the last."""
    config = DataConfig(workers=2)
    sizes = {"micro_batch_size": BATCH, "grad_accum_steps": 1}
    loader = TrainLoader(shards, config, image_size=64, seed=0, rank=0, world_size=1, **sizes)
    process, resident = psutil.Process(), []
    steps = loader.steps(LoaderState())
    for _ in range(num_epochs):
        for _step in islice(steps, loader.steps_per_epoch):
            pass
        resident.append(process.memory_info().rss)
    steps.close()
    return {"resident": resident[4], "growth": resident[-1] - resident[4], "epochs": num_epochs}


def measure(folder: Path, num_images: int, rounds: int) -> dict[str, Any]:
    """All figures, over photos that are written to `folder`."""
    write_photos(folder / "images", num_images)
    write_photos(folder / "few", 2 * BATCH)
    for name in ("images", "few"):
        write_shards(WriteConfig(kind="folder", source=folder / name), folder / f"{name}-shards", num_workers=1)
    shards = open_shards(folder / "images-shards")
    peers, missing = available_peers(folder / "images", folder)
    training = {
        "webdataset + Pillow + torchvision": lambda: webdataset_pillow(shards),
        **peers,
        "sret_scale": lambda: ours(shards),
    }
    reading = {
        "webdataset, in sequence": lambda: reads_by_webdataset(shards),
        "sret_scale, in random order": lambda: reads_in_random_order(shards),
    }
    rates = best_rates(training, num_images, rounds)
    reads = best_rates(reading, 20 * num_images, rounds)
    few = open_shards(folder / "few-shards")
    sizes = shards.length
    photos_facts = {"num_images": shards.num_samples, "mean_bytes": int(sizes.mean())}
    return {
        "photos": photos_facts,
        "training": rates,
        "missing": missing,
        "reading": reads,
        "memory_bytes": memory_growth_bytes(few, 50),
    }


def main() -> None:
    """Print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="folders with other loaders to compare with")
    args = parser.parse_args()
    sys.path.extend(str(folder.resolve()) for folder in args.peers)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="webdataset|timm")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.images, args.rounds)
    peers = [package for name, (package, _) in PEERS.items() if name in figures["training"]]
    names = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", *peers)
    facts = {
        "command": "python -m benchmarks.data " + " ".join(arg for arg in sys.argv[1:] if "/" not in arg),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "processor": platform.processor() or platform.machine(),
        "region_of_interest_decoding": roi.LIBRARY.exists(),
        **figures,
    }
    for table in ("training", "reading"):
        slowest = min(figures[table].values())
        for name, rate in sorted(figures[table].items(), key=lambda item: item[1]):
            print(f"{table:<9} {name:<36} {rate:>9,.0f} images/s  {rate / slowest:5.2f}x")
    for name, reason in figures["missing"].items():
        print(f"missing   {name}: {reason}")
    memory = figures["memory_bytes"]
    print(f"memory    {memory['growth'] / 2**20:+.1f} MiB from epoch 5 to {memory['epochs']}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
