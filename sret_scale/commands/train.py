"""`sret-scale train`: checks a run, starts it on its ranks, and continues it when it was interrupted."""

import argparse
from pathlib import Path

from sret_scale.commands.arguments import HOSTFILE

EXAMPLE = """examples:
  sret-scale train small data.train_folder=shards/photos/train data.test_folder=shards/photos/val
  sret-scale train sret_t data.train_folder=shards/train data.test_folder=shards/val
  sret-scale train runs/sret_t/config.yaml optim.learning_rate=5e-4 --run runs/slower
  sret-scale train sret_t train.total_images=90ep optim.warmup_images=5% data.train_folder=shards/train
  sret-scale train sret_t_1000 memory.schedule=binomial --hostfile hosts --dry-run
  sret-scale train sret_t_1000 --hostfile hosts --elastic 2:8

The same command continues a run that was stopped or killed. Exit status: 0 finished, 85 saved and stopped by a signal,
2 bad input, 1 failed, 3 no progress, 128 + n killed by signal n before it could save."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that decides what is computed is a config field; flags say only where and how to start."""
    parser.add_argument(
        "recipe",
        help="a recipe (small, sret, deit, fkd, deit3, ...), a model preset (see `describe`), timm:NAME?num_loops=2, a "
        "YAML file",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="configuration fields to change")
    parser.add_argument("--run", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--ranks", type=int, help="number of ranks on this machine (default: one per GPU, or 2 on CPU)")
    parser.add_argument("--hostfile", **HOSTFILE)
    parser.add_argument(
        "--elastic",
        metavar="MIN:MAX",
        help="run on as many hosts of the hostfile as can be reached, and carry on with the rest when one is lost",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="first delete the checkpoints and metrics of an earlier run in that folder"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the launch command and the configuration, and start nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Returns the run's exit status."""
    from sret_scale.config.recipes import configuration, is_file_name, recipe
    from sret_scale.config.run_config import RefusedError, to_yaml
    from sret_scale.launch.elastic import Elastic, start_elastic
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.preflight import start_run

    try:
        config = configuration(args.recipe, args.overrides)
    except RefusedError as error:
        if args.dry_run:
            print(error.text)
        raise
    folder = folder_of(args)
    if args.dry_run and not is_file_name(args.recipe):
        print(f"recipe: {recipe(args.recipe).about}")
    hosts = hosts_of(args.hostfile)
    try:
        if args.elastic is not None:
            elastic = Elastic.parse(args.elastic)
            return start_elastic(config, folder, hosts, elastic, is_fresh=args.fresh, dry_run=args.dry_run)
        return start_run(config, folder, num_ranks=args.ranks, hosts=hosts, is_fresh=args.fresh, dry_run=args.dry_run)
    except (ValueError, OSError):
        if args.dry_run:
            # What was refused is easier to mend where it can be read.
            print(to_yaml(config))
        raise


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of the run: the one asked for, that of a run's own configuration, or one called like the recipe."""
    file = Path(args.recipe)
    is_of_run = file.name == "config.yaml" and (file.parent / "environment.json").exists()
    name = file.stem.partition("?")[0].removeprefix("timm:")
    folder: Path = args.run or (file.parent if is_of_run else Path("runs") / name)
    return folder
