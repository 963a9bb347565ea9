"""`sret-scale shards sidecars`: the files by which other readers open the shards."""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale shards sidecars shards/imagenet/train --split train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the name of its split."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the shard set")
    parser.add_argument("--split", default="train", help="name of the split in timm's _info.json (default: train)")


def run(args: argparse.Namespace) -> None:
    """Write them and name them."""
    from data_pipelines.upkeep.sidecars import write_sidecars

    names = [path.name for path in write_sidecars(args.folder, split=args.split)]
    print(f"{args.folder}: {', '.join(name for name in names if name.endswith('.json'))} and the .idx of each shard")
