"""Speed of the training pipeline beside its peers, on the same photos: `python -m benchmarks.data`.

Three tables answer three questions: from stored JPEGs to uint8 views (RandomResizedCrop(224) and flips, bilinear and
antialiased), to normalised float batches, and to batches as the recipe trains on them (two operations of RandAugment,
erasing at 0.25, mixup 0.8 or cutmix 1.0). All run on one core, to which all processes are bound. Figures are images per
second of processor time of the whole process (threads included), because the machine may be shared; pipelines take
turns in rounds of seconds, and the median of the rounds counts for each.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Generator
from functools import partial
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

from benchmarks.data_peers import BATCH, MEAN, PEERS, RECIPE_PEER, STD, Peer, PeerError, cpu_rate, pillow_transform
from data_pipelines.config import DataConfig
from data_pipelines.image.augment import AugmentConfig
from data_pipelines.image.native import library as roi
from data_pipelines.image.normalise import Normaliser
from data_pipelines.keyed_random import keyed_permutation
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.stream.loader import Batch, LoaderState, TrainLoader
from data_pipelines.stream.reader import ShardReader
from data_pipelines.writing.write import WriteConfig, write_shards
from sret_scale.config.run_config import RunConfig
from sret_scale.tasks.classification import Classification


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


def views(shards: ShardSet) -> Generator[Batch]:
    """This project's loader: uint8 views."""
    config = DataConfig(workers=1, prefetch_batches=1, interpolation="bilinear")
    sizes = {"micro_batch_size": BATCH, "grad_accum_steps": 1}
    loader = TrainLoader(shards, config, image_size=224, seed=0, rank=0, world_size=1, **sizes)
    for step in loader.steps(LoaderState()):
        yield step.micro_batches[0]


def ours(shards: ShardSet) -> Generator[int]:
    """Its views, normalised."""
    normalise = Normaliser(MEAN, STD)
    for batch in views(shards):
        yield len(normalise(batch.images))


def recipe_rate(shards: ShardSet, policy: Any, seconds: float) -> float:
    return cpu_rate(lambda: ours_as_trained(shards, policy), seconds)


def ours_as_trained(shards: ShardSet, policy: Any) -> Generator[int]:
    """What `train` does between loader and model with the recipe's augmentation (`Classification.inputs`)."""
    task = Classification(RunConfig(augment=AugmentConfig(policy=policy)))
    for number, batch in enumerate(views(shards)):
        yield len(task.inputs(batch, seed=number, device=torch.device("cpu")).model_input)


def webdataset_pillow(shards: ShardSet) -> Generator[int]:
    """webdataset's own pipeline: shuffle buffer, Pillow, torchvision's transforms as in its examples."""
    transform = pillow_transform()
    urls = [str(shards.folder / name) for name in shards.shard_names]
    while True:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(100).decode("pil")
        for batch in dataset.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH, partial=False):
            yield len(batch[0])


def reads_in_random_order(shards: ShardSet) -> Generator[int]:
    """Index and pread, every checksum compared."""
    with ShardReader(shards) as reader:
        while True:
            for number, index in enumerate(keyed_permutation(shards.num_samples, "benchmark").tolist(), 1):
                reader.read(index)
                if number % BATCH == 0:
                    yield BATCH


def reads_by_webdataset(shards: ShardSet) -> Generator[int]:
    """webdataset's sequential reader, nothing decoded."""
    urls = [str(shards.folder / name) for name in shards.shard_names]
    while True:
        for number, _ in enumerate(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False), 1):
            if number % BATCH == 0:
                yield BATCH


def median_rates(pipelines: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """What each measures, in turns: the median of the rounds, and all of them."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, measure_once in pipelines.items():
            rates[name].append(round(measure_once(), 1))
    return {name: {"median": statistics.median(values), "rounds": values} for name, values in rates.items()}


def start_peers(
    peers: dict[str, list[Path]], images: Path, work: Path
) -> tuple[dict[str, Peer], dict[str, str], dict[str, str]]:
    """The peers that work here by their names in the table, their versions, and why the others do not."""
    running: dict[str, Peer] = {}
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    for key, folders in peers.items():
        name, package, _ = PEERS[key]
        try:
            running[name] = Peer(key, folders, images, work)
            versions[package] = running[name].version
        except PeerError as error:
            missing[name] = str(error)
    return running, versions, missing


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


def measure(
    folder: Path, peers: dict[str, list[Path]], *, num_images: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """All figures, over photos that are written to `folder`, in rounds of `seconds` of processor time."""
    write_photos(folder / "images", num_images)
    write_photos(folder / "few", 2 * BATCH)
    for name in ("images", "few"):
        write_shards(WriteConfig(kind="folder", source=folder / name), folder / f"{name}-shards", num_workers=1)
    shards = open_shards(folder / "images-shards")
    few = open_shards(folder / "few-shards")
    running, versions, missing = start_peers(peers, folder / "images", folder)
    try:
        training: dict[str, Callable[[], float]] = {
            "webdataset + Pillow + torchvision": lambda: cpu_rate(lambda: webdataset_pillow(shards), seconds),
            "sret_scale": lambda: cpu_rate(lambda: ours(shards), seconds),
            **{name: partial(peer.rate, seconds) for name, peer in running.items() if name != RECIPE_PEER},
        }
        rates = median_rates(training, rounds)
        as_trained: dict[str, Callable[[], float]] = {
            **{name: partial(peer.rate, seconds) for name, peer in running.items() if name == RECIPE_PEER},
            "sret_scale, torchvision's policy": lambda: cpu_rate(
                lambda: ours_as_trained(shards, "torchvision"), seconds
            ),
            "sret_scale, timm's policy": lambda: cpu_rate(lambda: ours_as_trained(shards, "timm"), seconds),
        }
        trained = median_rates(as_trained, rounds)
    finally:
        for peer in running.values():
            peer.close()
    reading: dict[str, Callable[[], float]] = {
        "webdataset, in sequence": lambda: cpu_rate(lambda: reads_by_webdataset(shards), seconds),
        "sret_scale, in random order": lambda: cpu_rate(lambda: reads_in_random_order(shards), seconds),
    }
    return {
        "peer_versions": versions,
        "photos": {"num_images": shards.num_samples, "mean_bytes": int(shards.length.mean())},
        "views": median_rates(
            {"sret_scale": lambda: cpu_rate(lambda: (len(batch.images) for batch in views(shards)), seconds)}, rounds
        ),
        "training": rates,
        "as_trained": trained,
        "missing": missing,
        "reading": median_rates(reading, rounds),
        "memory_bytes": memory_growth_bytes(few, 50),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time of a round of one pipeline")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--peer",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help=f"another loader to compare with ({', '.join(PEERS)}), and the folders that hold it, if any",
    )
    args = parser.parse_args()
    for name, *_ in args.peer:
        if name not in PEERS:
            parser.error(f"--peer {name}: expected one of {', '.join(PEERS)}")
    return args


def main() -> None:
    """Print a table and write the figures as JSON."""
    args = _arguments()
    torch.set_num_threads(1)
    # The processes of the peers inherit it.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore", module="webdataset")
    peers = {name: [Path(folder) for folder in folders] for name, *folders in args.peer}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_images": args.images, "rounds": args.rounds, "seconds": args.seconds}
        figures = measure(Path(folder), peers, **sizes)
    names = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg")
    versions = {name: importlib.metadata.version(name) for name in names} | figures.pop("peer_versions")
    base = figures["training"]["webdataset + Pillow + torchvision"]["median"]
    facts = {
        "command": f"python -m benchmarks.data --images {args.images} --rounds {args.rounds} "
        + f"--seconds {args.seconds:g} "
        + " ".join(f"--peer {name} FOLDER..." for name in peers),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "unit": "images per second of processor time, all threads, on one core; medians of rounds in turns",
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "load": [load_before, os.getloadavg()[0]]},
        "versions": versions,
        "compiled_library": roi.is_in_use(),
        "times_webdataset": round(figures["training"]["sret_scale"]["median"] / base, 2),
        **figures,
    }
    for table in ("views", "training", "as_trained", "reading"):
        base = next(iter(figures[table].values()))["median"]
        for name, rate in sorted(figures[table].items(), key=lambda item: item[1]["median"]):
            low, high = min(rate["rounds"]), max(rate["rounds"])
            spread = f"({low:,.0f} to {high:,.0f})"
            print(f"{table:<10} {name:<36} {rate['median']:>9,.0f} images/s {spread:<20} {rate['median'] / base:5.2f}x")
    for name, reason in figures["missing"].items():
        print(f"missing   {name}: {reason}")
    memory = figures["memory_bytes"]
    print(f"memory    {memory['growth'] / 2**20:+.1f} MiB from epoch 5 to {memory['epochs']}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=2) + "\n")


def processor_name() -> str:
    """As the kernel names it."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return str(names[0]) if names else platform.machine()


if __name__ == "__main__":
    main()
