"""`sret-scale shards trace`: which samples a rank reads, so that anyone can check the order of a run."""

import argparse

EXAMPLE = """\
example: sret-scale shards trace shards/fashion/train --world-size 2 --rank 1 --seed 0 --epoch 3 --from 5120 \\
             --count 64 --global-batch 256

Positions count the samples of all ranks from the start of the epoch. Rank r takes the contiguous r-th part of each
global batch. The trace ends with the epoch: an incomplete last batch is left out (--last drop) or filled up with the
first samples of the same epoch (--last pad)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides on a rank's samples."""
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder or URL of the shard set; several make a mixture"
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="weights of a mixture (default: numbers of samples)",
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="number of ranks (default 1)")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose samples (default 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the run (default 0)")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="epoch, from 0 (default 0)")
    parser.add_argument(
        "--from",
        type=int,
        default=0,
        metavar="POSITION",
        dest="position",
        help="position to start from, where a global batch begins (default 0)",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="number of keys to print (default: to the end of the epoch)"
    )
    parser.add_argument("--global-batch", type=int, required=True, metavar="B", help="samples of all ranks per step")
    parser.add_argument(
        "--order", choices=("full", "block", "sequential"), default="full", help="order of the samples (default full)"
    )
    parser.add_argument(
        "--last",
        choices=("drop", "pad"),
        default="drop",
        help="what to do with an incomplete last batch (default drop)",
    )
    parser.add_argument(
        "--block-window", type=int, default=8192, metavar="N", help="window of --order block (default 8192)"
    )
    parser.add_argument(
        "--num-repeats", type=int, default=1, metavar="N", help="views of each sample per epoch (default 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the keys."""
    from data_pipelines.checked_files import printable
    from data_pipelines.config import DataConfig
    from data_pipelines.remote.shard_sets import open_training_data
    from data_pipelines.stream.order import Order
    from data_pipelines.stream.trace import trace_keys

    config = DataConfig(
        train_folder=args.folders[0],
        mixture_folders=tuple(args.folders[1:]),
        mixture_weights=tuple(args.weights),
        order=args.order,
        block_window=args.block_window,
        num_repeats=args.num_repeats,
    )
    shards = open_training_data(config)
    keys = trace_keys(
        shards,
        Order.of(shards, config, seed=args.seed, global_batch_size=args.global_batch),
        last=args.last,
        world_size=args.world_size,
        rank=args.rank,
        epoch=args.epoch,
        position=args.position,
        count=args.count,
    )
    for key in keys:
        print(printable(key))
