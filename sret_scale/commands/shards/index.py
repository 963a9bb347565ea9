"""`sret-scale shards index`: index and manifest for tars that someone else wrote."""

import argparse
import os
from pathlib import Path

EXAMPLE = """example: sret-scale shards index shards/from_elsewhere
Class names are read from classes.txt in the folder, one per line; without it, classes are named by number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of webdataset tars with .cls labels")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes (default: one per core)"
    )


def run(args: argparse.Namespace) -> None:
    """Make the index and say what it holds."""
    from data_pipelines.upkeep.foreign import index_shards
    from sret_scale.commands.shards.progress import progress_bar

    with progress_bar("indexing") as on_progress:
        manifest = index_shards(args.folder, num_workers=args.workers, on_progress=on_progress)
    print(
        f"{args.folder}: {manifest.num_samples:,} samples of {len(manifest.class_names)} classes in"
        f" {len(manifest.shards)} shards"
    )
