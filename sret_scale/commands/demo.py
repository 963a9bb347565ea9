"""`sret-scale demo`: shards, a teacher, a student of 108 applications, a shallow control and a report."""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale demo --source /usr/share/datasets/fashion-mnist"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where from and where to."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder to write into (default: %(default)s)"
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with the four IDX files of the full Fashion-MNIST (default: the included sample)",
    )


def run(args: argparse.Namespace) -> int:
    """Every part that is already there is skipped, so the same command continues an interrupted demo."""
    from sret_scale.lab.demo import run_demo

    return run_demo(args.output, args.source)
