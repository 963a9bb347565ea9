"""`sret-scale shards write`: images to webdataset shards."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sret_scale.commands.arguments import WORKERS

if TYPE_CHECKING:
    from data_pipelines.grids.made import GridOptions
    from data_pipelines.writing.write import WriteConfig

# As in `data_pipelines.sources.kinds`, which imports too much for --help.
KINDS = ("folder", "idx", "ilsvrc", "mazes", "moses", "parquet", "products", "tars", "text", "tsv")
PUZZLES = {"mazes": ("reach", "twins", "path"), "products": ("z2", "s3", "a5")}

# As in `data_pipelines.shards.hashes`, which imports xxhash.
HASH_NAMES = ("xxh3_128", "sha256")

EXAMPLE = """example:
  sret-scale shards write idx data_pipelines/sample/fashion_mnist shards/fashion/train --split train
The same command continues after an interruption. Started on several nodes
with a common TARGET (srun ./launch.sh shards write ...), it shares the work among them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, target and how the shards are cut."""
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help="kind of source: " + ", ".join(KINDS))
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="images or texts; of moses two files, as train.de,train.en; mazes and products have only a TARGET",
    )
    parser.add_argument(
        "target", type=Path, metavar="TARGET", nargs="?", help="folder of the shard set; created if missing"
    )
    parser.add_argument(
        "--split",
        help="part of the source: train or test (idx), train or val (ilsvrc), file prefix (parquet); of a folder the "
        "share kept for validation, as 0.1: writes TARGET/train and TARGET/val, drawn by --seed",
    )
    parser.add_argument(
        "--classes",
        metavar="FROM",
        help="number the classes as this set does: the shard folder of the training set, or a text file of names",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for shuffling the images, or for making them (default: 0)"
    )
    parser.add_argument("--count", type=int, help="samples to make (mazes, products)")
    parser.add_argument("--size", default="15", help="their pixels a side, or a range such as 7-15 (default: 15)")
    parser.add_argument(
        "--puzzle", help="what is asked: reach, twins or path (mazes), or in which group: z2, s3 or a5 (products)"
    )
    parser.add_argument("--braid", type=float, default=0.0, help="share of a maze's dead ends to open (default: 0)")
    parser.add_argument("--snake", action="store_true", help="products go back in every second row")
    parser.add_argument("--window", type=int, help="bytes of a window, or at most of a side of a pair (default: 256)")
    parser.add_argument(
        "--carried", type=int, help="bytes that a window repeats of the one before it, as its context (default: 0)"
    )
    parser.add_argument("--vocabulary", type=int, help="of pairs: train a joint sentencepiece model of so many tokens")
    parser.add_argument("--keep-order", action="store_true", help="keep the source's order instead of shuffling")
    parser.add_argument("--shard-mb", type=float, default=256.0, help="size of a shard in MiB (default: 256)")
    parser.add_argument("--shard-samples", type=int, help="samples per shard, instead of --shard-mb")
    parser.add_argument("--no-metadata", action="store_true", help="leave out the .json member with class and origin")
    parser.add_argument(
        "--on-bad", default="fail", help="what to do with a bad image: fail, skip or quarantine (default: fail)"
    )
    parser.add_argument(
        "--max-bad-rate", type=float, default=0.01, help="stop if more than this share is bad (default: 0.01)"
    )
    parser.add_argument("--check", default="header", help="how to check an image: header or decode (default: header)")
    parser.add_argument(
        "--hash",
        choices=HASH_NAMES,
        default="xxh3_128",
        help="checksum of the tars in the manifest: xxh3_128 detects accidents (default); sha256 is slower and also"
        " detects forgery",
    )
    parser.add_argument("--resize", type=int, help="shrink images whose short side is longer than this, in pixels")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of shrunk images (default: 95)")
    parser.add_argument("--workers", **WORKERS)


def run(args: argparse.Namespace) -> None:
    """Write the shards and say what was written."""
    from data_pipelines.sources.listing import class_names_from
    from data_pipelines.text.pieces import KIND, PAIR_KINDS, TextWindows
    from data_pipelines.writing.prepare import ImageOptions
    from data_pipelines.writing.write import WriteConfig

    made = _made(args) if args.kind in PUZZLES else None
    idle: tuple[str, ...] = ("split", "classes") if made else ("count", "puzzle", "braid", "snake")
    is_text = args.kind in (KIND, *PAIR_KINDS)
    idle += ("resize", "classes") if is_text else ("window",)
    idle += () if args.kind == KIND else ("carried",)
    idle += () if args.kind in PAIR_KINDS else ("vocabulary",)
    if unused := [f"--{name}" for name in idle if getattr(args, name)]:
        raise ValueError(f"shards write {args.kind}: has no use for {' '.join(unused)}; leave that out")
    if (args.target is None) != (made is not None):
        raise ValueError(f"shards write {args.kind}: expected {'one folder, TARGET' if made else 'SOURCE and TARGET'}")
    config = WriteConfig(
        kind=args.kind,
        source=made or args.source,
        seed=None if args.keep_order or made else args.seed,
        shard_bytes=int(args.shard_mb * 2**20),
        shard_samples=args.shard_samples,
        options=ImageOptions(
            on_bad=args.on_bad,
            check=args.check,
            resize=args.resize,
            quality=args.quality,
            # The key of a window or of a pair says all that there is to say of it.
            metadata=not args.no_metadata and not is_text,
        ),
        hash_name=args.hash,
        class_names=class_names_from(Path(args.classes)) if args.classes else None,
        text=TextWindows(window=256 if args.window is None else args.window, carried=args.carried or 0)
        if is_text
        else None,
        vocabulary=args.vocabulary,
    )
    for split, target in {None: args.source}.items() if made else _sets(args).items():
        _write(replace(config, split=split), target, args)


def _made(args: argparse.Namespace) -> "GridOptions":
    from data_pipelines.grids.made import GridOptions

    if args.puzzle not in (puzzles := PUZZLES[args.kind]) or args.count is None:
        raise ValueError(f"shards write {args.kind}: expected --count and --puzzle, one of {', '.join(puzzles)}")
    sizes = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", args.size)
    if sizes is None:
        raise ValueError(f"--size {args.size}: expected a number of pixels, or two as in 7-15")
    smallest, largest = int(sizes[1]), int(sizes[2] or sizes[1])
    options = {name: getattr(args, name) for name in ("puzzle", "count", "seed", "braid", "snake")}
    return GridOptions(smallest=smallest, largest=largest, **options)


def _sets(args: argparse.Namespace) -> dict[str | None, Path]:
    """Split of each set to write -> its folder."""
    from data_pipelines.sources.folder import split_name

    try:
        share = float(args.split)
    except (TypeError, ValueError):
        return {args.split: args.target}
    if args.kind != "folder" or not 0 < share < 1:
        raise ValueError(f"--split {args.split}: a share between 0 and 1 of an image folder, or a name, was expected")
    return {split_name(part, args.split, args.seed): args.target / part for part in ("train", "val")}


def _write(config: "WriteConfig", target: Path, args: argparse.Namespace) -> None:
    from data_pipelines.writing.write import write_shards
    from sret_scale.commands.shards.progress import progress_bar

    with progress_bar("writing") as on_progress:
        manifest = write_shards(
            config, target, num_workers=args.workers, max_bad_rate=args.max_bad_rate, on_progress=on_progress
        )
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{target}: {manifest.num_samples:,} samples of {len(manifest.class_names)} classes in"
        f" {len(manifest.shards)} {'shard' if len(manifest.shards) == 1 else 'shards'}, {num_bytes / 2**20:,.1f} MiB,"
        f" {manifest.num_rejected} left out"
    )
