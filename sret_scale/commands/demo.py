"""`sret-scale demo`: shards, training, evaluation and a page: the whole path on images, or how far a maze is read."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale demo --source /usr/share/datasets/fashion-mnist
  sret-scale demo reach

path    a teacher, a student of 108 applications and a shallow control on images of clothes
reach   one block that learns on small mazes, and reads larger ones the farther the more often it is applied"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, where from and where to."""
    parser.add_argument("which", nargs="?", choices=("path", "reach"), default="path", help="(default: path)")
    parser.add_argument("--output", type=Path, help="folder to write into (default: runs/demo, runs/reach)")
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with the four IDX files of the full Fashion-MNIST (default: the included sample)",
    )


def run(args: argparse.Namespace) -> int:
    """Every part that is already there is skipped, so the same command continues an interrupted demo."""
    if args.which == "reach":
        if args.source is not None:
            raise ValueError("--source is of the demo on images: the mazes of `demo reach` are made")
        from sret_scale.lab.reach_demo import run_reach_demo

        return run_reach_demo(args.output or Path("runs/reach"))
    from sret_scale.lab.demo import run_demo

    return run_demo(args.output or Path("runs/demo"), args.source)
