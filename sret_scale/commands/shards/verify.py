"""`sret-scale shards verify`: reads everything and reports what is wrong."""

import argparse
from pathlib import Path

from sret_scale.commands.arguments import WORKERS

EXAMPLE = """example: sret-scale shards verify shards/fashion/train
Prints one line per problem, with shard, key, offset and reason; the exit status is then 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and how thorough to be."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the shard set")
    parser.add_argument(
        "--no-decode", action="store_true", help="check bytes and structure only, without decoding images"
    )
    parser.add_argument("--workers", **WORKERS)


def run(args: argparse.Namespace) -> int:
    """Check the set; 1 when anything is wrong."""
    from data_pipelines.checked_files import printable
    from data_pipelines.upkeep.verify import verify_shards
    from sret_scale.commands.shards.progress import progress_bar

    with progress_bar("verifying") as on_progress:
        findings = verify_shards(
            args.folder, num_workers=args.workers, decode=not args.no_decode, on_progress=on_progress
        )
    for finding in findings:
        print(printable(finding))
    print(f"{args.folder}: {f'damaged, {len(findings)} found' if findings else 'intact'}")
    return 1 if findings else 0
