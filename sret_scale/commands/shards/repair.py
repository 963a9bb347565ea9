"""`sret-scale shards repair`: a new set without what is bad in another one."""

import argparse
from pathlib import Path

from sret_scale.commands.arguments import WORKERS

EXAMPLE = """example: sret-scale shards repair shards/train shards/train_good --copy /backup/shards/train
Bad samples are replaced from the copy if it has them, and left out otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The damaged set, the new one and a copy."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the damaged shard set; it is not changed")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder of the new shard set")
    parser.add_argument("--copy", type=Path, help="another copy of the set, to replace bad samples from")
    parser.add_argument("--shard-samples", type=int, help="samples per shard (default: by size, 256 MiB)")
    parser.add_argument("--workers", **WORKERS)


def run(args: argparse.Namespace) -> None:
    """Repair and say what was done."""
    from data_pipelines.upkeep.repair import repair_shards
    from sret_scale.commands.shards.progress import progress_bar

    with progress_bar("repairing") as on_progress:
        repair = repair_shards(
            args.folder,
            args.target,
            copy=args.copy,
            shard_samples=args.shard_samples,
            num_workers=args.workers,
            on_progress=on_progress,
        )
    print(
        f"{args.target}: {repair.manifest.num_samples:,} samples; {repair.num_replaced:,} bad ones were replaced,"
        f" {repair.num_dropped:,} left out"
    )
