"""`sret-scale demo`: shards, training, evaluation and a page: the whole path on images, mazes, or a translator."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale demo --source /usr/share/datasets/fashion-mnist
  sret-scale demo reach
  sret-scale demo text

path    a teacher, a student of 108 applications and a shallow control on images of clothes
reach   one block that learns on small mazes, and reads larger ones the farther the more often it is applied
text    a translator that learns from help pages, and one of 108 applications"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which, where from and where to."""
    parser.add_argument("which", nargs="?", choices=("path", "reach", "text"), default="path", help="(default: path)")
    parser.add_argument("--output", type=Path, help="folder to write into (default: runs/demo, runs/reach, runs/text)")
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with the four IDX files of the full Fashion-MNIST (default: the included sample)",
    )


def run(args: argparse.Namespace) -> int:
    """Every part that is already there is skipped, so the same command continues an interrupted demo."""
    if args.which != "path" and args.source is not None:
        raise ValueError(f"--source is of the demo on images: `demo {args.which}` has its own data")
    if args.which == "reach":
        from sret_scale.lab.reach_demo import run_reach_demo

        return run_reach_demo(args.output or Path("runs/reach"))
    if args.which == "text":
        from sret_scale.lab.text_demo import run_text_demo

        return run_text_demo(args.output or Path("runs/text"))
    from sret_scale.lab.demo import run_demo

    return run_demo(args.output or Path("runs/demo"), args.source)
