"""`sret-scale shards index`: index and manifest for tars that someone else wrote."""

import argparse
from pathlib import Path

from sret_scale.commands.arguments import WORKERS

EXAMPLE = """examples:
  sret-scale shards index shards/from_elsewhere
  sret-scale shards index "https://host/set/train-{000000..000146}.tar" --output shards/train
  sret-scale shards index "/data/set/train-{000000..000146}.tar" --output shards/train

Class names are read from classes.txt, one per line, in the folder of the index or of the tars; without it, classes are
named by number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the tars are, and where their index goes."""
    parser.add_argument(
        "source",
        metavar="FOLDER|PATTERN",
        help="folder of webdataset tars with .cls labels, or webdataset's pattern of paths or URLs with {000..146}",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="leave the tars alone: write the index here, for `train` to use"
    )
    parser.add_argument("--workers", **WORKERS)


def run(args: argparse.Namespace) -> None:
    """Make the index and say what it holds."""
    from data_pipelines.upkeep.foreign import index_shards
    from sret_scale.commands.shards.progress import progress_bar

    with progress_bar("indexing") as on_progress:
        manifest = index_shards(args.source, args.output, num_workers=args.workers, on_progress=on_progress)
    print(
        f"{args.output or args.source}: {manifest.num_samples:,} samples of {len(manifest.class_names)} classes in"
        f" {len(manifest.shards)} shards"
    )
