"""`sret-scale checkpoint`: which checkpoints a run has, whether they are intact, and DeepSpeed's layout of them."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale checkpoint info runs/demo/student
  sret-scale checkpoint verify runs/demo/student
  sret-scale checkpoint convert runs/demo/student --to universal    # for DeepSpeed's load_universal
  sret-scale checkpoint convert runs/demo/student --from universal  # the next checkpoint of the run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which run."""
    parser.add_argument(
        "action",
        choices=("info", "verify", "convert"),
        help="info: list the checkpoints; verify: read and check every file; convert: to or from DeepSpeed's universal "
        "layout",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="with convert: export the newest checkpoint to this folder"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="with convert: import this folder as the newest checkpoint",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 when a checkpoint is damaged."""
    if args.action == "convert":
        return convert(args)
    if args.to or args.source:
        raise ValueError(f"--to and --from belong to `checkpoint convert`, not to `checkpoint {args.action}`")
    return check(args)


def convert(args: argparse.Namespace) -> int:
    """Print where the converted checkpoint is."""
    from sret_scale.train.convert import export_run, import_run

    if (args.to is None) == (args.source is None):
        raise ValueError("checkpoint convert takes one of --to FOLDER (export) and --from FOLDER (import)")
    print(export_run(args.run, args.to) if args.to else import_run(args.run, args.source))
    return 0


def check(args: argparse.Namespace) -> int:
    """One line for each checkpoint."""
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
