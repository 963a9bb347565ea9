"""`sret-scale shards bench`: how fast a shard set is read on this machine, and what the loader reaches."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

EXAMPLE = """example: sret-scale shards bench shards/imagenet/train --cold
All stages but the loader use one thread. Without --cold, data read recently comes from memory, not from the disk."""

_STAGES = {
    "sequential": "tars front to back",
    "random": "single samples by the index, checked",
    "decode": "and all pixels decoded",
    "view": "and cut to the view that training sees",
    "loader": "batches of one rank",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and how to measure."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the shard set")
    parser.add_argument("--seconds", type=float, default=5.0, help="at most this long per stage (default: 5)")
    parser.add_argument("--image-size", type=int, default=224, help="side of a view in pixels (default: 224)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of the loader (default: one per core)"
    )
    parser.add_argument("--cold", action="store_true", help="drop the tars from the page cache before each stage")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> None:
    """Measure stage by stage and print each result as it comes."""
    from data_pipelines.upkeep.speed import measure_speed

    results: dict[str, dict[str, Any]] = {}
    measured = measure_speed(
        args.folder, seconds=args.seconds, image_size=args.image_size, num_threads=args.threads, cold=args.cold
    )
    if not args.json:
        print(f"{args.folder}, views of {args.image_size} px, loader with {args.threads} threads")
    for speed in measured:
        results[speed.stage] = {
            "images_per_s": round(speed.images_per_s, 1),
            "mb_per_s": round(speed.bytes_per_s / 1e6, 1),
            "images": round(speed.images),
            "seconds": round(speed.seconds, 3),
        }
        if not args.json:
            print(
                f"  {speed.stage:<10} {speed.images_per_s:>9,.0f} images/s {speed.bytes_per_s / 1e6:>9,.1f} MB/s"
                f"   {_STAGES[speed.stage]}",
                flush=True,
            )
    if args.json:
        print(json.dumps(results, indent=2))
