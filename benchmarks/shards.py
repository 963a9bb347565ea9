"""Speed of making shards beside the usual script, on the same JPEGs: `python -m benchmarks.shards`.

The usual script is webdataset's ShardWriter fed by a loop over an image folder, reading file bytes. Both keep all bytes
and write the same images to the same disk; they take turns, and the best of the rounds counts for each. Processor time
is of all processes, because the machine may be shared.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.shards.index import WORK_FOLDER, open_shards
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing import workers
from data_pipelines.writing.shard_writer import write_shard
from data_pipelines.writing.write import WriteConfig, write_shards

SHARD_SAMPLES = 500

# Images that differ; making them takes longer than all that is measured. The others are copies, files of their own.
NUM_DIFFERENT = 300


def make_images(root: Path, num_images: int) -> Path:
    """JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's are on average, in 10 classes."""
    generator = np.random.default_rng(0)
    different = []
    for _ in range(min(num_images, NUM_DIFFERENT)):
        noise = generator.normal(128, 26, (375, 500, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(buffer := io.BytesIO(), "JPEG", quality=90)
        different.append(buffer.getvalue())
    for index in range(num_images):
        path = root / f"class{index % 10}" / f"image{index:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(different[index % len(different)])
    os.sync()
    return root


def usual_script(root: Path, target: Path) -> None:
    """webdataset's ShardWriter in a loop over the folder."""
    # Here, because worker processes import this file again, and webdataset costs them a second.
    import webdataset

    target.mkdir()
    classes = sorted(path.name for path in root.iterdir())
    with webdataset.ShardWriter(str(target / "shard-%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for label, name in enumerate(classes):
            for path in sorted((root / name).iterdir()):
                writer.write({"__key__": f"{name}/{path.stem}", "jpg": path.read_bytes(), "cls": label})


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall seconds, processor seconds of this process and its finished children)."""
    before, start = _processor_s(), time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - start, _processor_s() - before


def _processor_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def resume_after_stop(config: WriteConfig, folder: Path) -> tuple[float, float]:
    """(seconds to write the whole set again from nothing, seconds to continue one that lacks its last shard)."""
    whole_s, _ = measure(lambda: write_shards(config, folder / "whole"))

    def stop_at_last(plan: Any, index: int, *args: Any, **options: Any) -> Any:
        if index == plan.num_shards - 1:
            raise InterruptedError("stopped")
        return write_shard(plan, index, *args, **options)

    workers.write_shard = stop_at_last  # type: ignore[attr-defined]
    try:
        write_shards(config, folder / "stopped")
    except InterruptedError:
        assert (folder / "stopped" / WORK_FOLDER).exists()
    workers.write_shard = write_shard  # type: ignore[attr-defined]
    resumed_s, _ = measure(lambda: write_shards(config, folder / "stopped"))
    return whole_s, resumed_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--images", type=int, default=3000, help="number of JPEGs (default: 3000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    # webdataset leaves the closing of its files to the garbage collector.
    warnings.simplefilter("ignore", ResourceWarning)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tree = make_images(folder / "tree", args.images)
        print(json.dumps(_measurements(tree, folder, args.images, args.rounds), indent=1))


def _measurements(tree: Path, folder: Path, num_images: int, rounds: int) -> dict[str, Any]:
    config = WriteConfig(kind="folder", source=tree, shard_samples=SHARD_SAMPLES)
    targets: dict[str, Callable[[Path], Any]] = {
        "usual script": lambda target: usual_script(tree, target),
        "write, 1 worker": lambda target: write_shards(config, target),
        "write, 2 workers": lambda target: write_shards(config, target, num_workers=2),
        "write, 2 workers, sha256": lambda target: write_shards(
            replace(config, hash_name="sha256"), target, num_workers=2
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in targets}
    for number in range(rounds):
        for name, work in targets.items():
            target = folder / f"{name} {number}"
            times[name].append(measure(partial(work, target)))
            if number or name != "write, 1 worker":
                shutil.rmtree(target)
    shards = folder / "write, 1 worker 0"
    rates = {name: _rates(pairs, num_images) for name, pairs in times.items()}
    checked = {
        f"verify, {num_workers} workers, decode {decode}": _rates(
            [measure(partial(verify_shards, shards, num_workers=num_workers, decode=decode))], num_images
        )
        for num_workers, decode in ((1, False), (1, True), (2, True))
    }
    whole_s, resumed_s = resume_after_stop(config, folder)
    start = time.perf_counter()
    opened = open_shards(shards)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "images": num_images,
        "mean_bytes": int(opened.length.mean()),
        **rates,
        "2 workers to usual script": round(
            rates["write, 2 workers"]["images_per_s"] / rates["usual script"]["images_per_s"], 2
        ),
        **checked,
        "whole_s": round(whole_s, 2),
        f"resume_with_1_of_{opened.num_shards}_shards_missing_s": round(resumed_s, 2),
        "open_s": round(time.perf_counter() - start, 4),
    }


def _rates(pairs: list[tuple[float, float]], num_images: int) -> dict[str, float]:
    """Images per second, of wall and of processor time, in the best round of each."""
    return {
        "images_per_s": round(num_images / min(pair[0] for pair in pairs)),
        "images_per_processor_s": round(num_images / min(pair[1] for pair in pairs)),
    }


if __name__ == "__main__":
    main()
