"""`sret-scale checkpoint`: which checkpoints a run has, and whether they are intact."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale checkpoint info runs/demo/student
  sret-scale checkpoint verify runs/demo/student"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which run."""
    parser.add_argument(
        "action",
        choices=("info", "verify"),
        help="info: list the checkpoints; verify: read and check every file",
    )
    parser.add_argument("run", type=Path, help="folder of the run")


def run(args: argparse.Namespace) -> int:
    """One line for each checkpoint; 1 when one is damaged."""
    from sret_scale.runs.checkpoint import CheckpointError, list_checkpoints, read_state, verify_checkpoint
    from sret_scale.runs.rank_errors import in_words
    from sret_scale.runs.run_folder import RunFolder

    if not args.run.is_dir():
        raise FileNotFoundError(f"no run folder {args.run}: expected the folder of a run")
    checkpoints = list_checkpoints(RunFolder(args.run).checkpoints)
    if not checkpoints:
        raise FileNotFoundError(f"{args.run} has no checkpoints: expected the folder of a run that has saved one")
    num_bad = 0
    for path in checkpoints:
        try:
            if args.action == "verify":
                verify_checkpoint(path)
                print(f"{path}: intact")
            else:
                state = read_state(path)
                num_bytes = sum(file.stat().st_size for file in path.iterdir())
                print(f"{path}: {state['images']:,} images, {state['time_s']:,.0f} s of training, {num_bytes:,} bytes")
        except CheckpointError as error:
            num_bad += 1
            print(f"damaged: {in_words(error)}")
    return int(num_bad > 0)
