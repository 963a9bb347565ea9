"""`sret-scale slurm`: prints the batch file that runs a command on a Slurm cluster."""

import argparse
import dataclasses
import sys
from pathlib import Path

from sret_scale.commands import COMMANDS
from sret_scale.commands.arguments import parsed
from sret_scale.runs.rank_errors import in_words

EXAMPLE = """examples:
  sret-scale slurm --nodes 4 --gpus 8 --cpus 96 --time 1-00:00:00 -- train sret_t_1000 data.train_folder=shards > job.sh
  sbatch job.sh
  sret-scale slurm --nodes 1 --cpus 48 --time 12:00:00 --sbatch=--constraint=a100 --setup env.sh -- sweep depth.yaml
  sret-scale slurm --array 16 --nodes 1 --cpus 12 --gpus 1 --time 12:00:00 -- sweep depth.yaml

The job saves and requeues itself before its time limit, and continues after a preemption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What Slurm is asked for, then the command."""
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs per node, one rank each (default: none, train on CPU)"
    )
    parser.add_argument("--cpus", type=int, required=True, help="CPU cores per node")
    parser.add_argument("--time", required=True, help="time limit in Slurm's format, such as 1-00:00:00")
    parser.add_argument("--partition", default="", help="partition (default: the cluster's)")
    parser.add_argument("--account", default="", help="account to charge (default: yours)")
    parser.add_argument("--name", default="sret-scale", help="name of the job (default: %(default)s)")
    parser.add_argument("--mem", default="", help="memory per node, such as 200G (default: the cluster's)")
    parser.add_argument("--exclusive", action="store_true", help="take whole nodes")
    parser.add_argument(
        "--output", default="", help="file of what the job prints, such as logs/%%j.out (default: Slurm's)"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="LINE", help="one more #SBATCH line, such as --qos=long"
    )
    parser.add_argument(
        "--array", type=int, metavar="N", help="a sweep as a job array: each run a task of its own, N of them at once"
    )
    parser.add_argument(
        "--setup", type=Path, metavar="FILE", help="shell file to source before the command: modules, NCCL's variables"
    )
    parser.add_argument(
        "--warning", type=int, default=300, help="how many seconds before the limit to save and requeue (default: 300)"
    )
    parser.add_argument(
        "arguments",
        # All that follows, options too.
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="a sret-scale command with its arguments, after --",
    )


def run(args: argparse.Namespace) -> None:
    """Print the file, once the command is one that would start; nothing is submitted."""
    from sret_scale.launch.sbatch import BatchOptions, batch_file

    args.arguments = args.arguments[args.arguments[:1] == ["--"] :]
    if not args.arguments or args.arguments[0] not in COMMANDS:
        raise ValueError(f"expected a command of sret-scale after --, such as train, got {args.arguments[:1]}")
    check_command(args)
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(BatchOptions)}
    print(batch_file(BatchOptions(**options), args.arguments), end="")


def check_command(args: argparse.Namespace) -> None:
    """Raise ValueError for a run that its start would refuse; say on stderr what is missing here.

    The nodes may have folders that this machine has not. A sweep as a job array gets a task for each of its runs.
    """
    from sret_scale.commands.train import folder_of
    from sret_scale.config.recipes import configuration
    from sret_scale.config.run_config import whole_paths
    from sret_scale.lab.experiments.declared import load_experiment
    from sret_scale.launch.preflight import check_start

    name, *words = args.arguments
    given = parsed(name, words)
    if args.array is not None:
        if name != "sweep" or args.array < 1:
            raise ValueError(f"--array {args.array}: expected how many tasks at once, 1 or more, and a sweep after --")
        _, planned = load_experiment(given.experiment, changes=given.overrides, rehearsal=given.rehearse)
        args.sbatch.append(f"--array=0-{len(planned) - 1}%{args.array}")
        args.arguments.append("--array-task")
    if name != "train":
        return
    config = whole_paths(configuration(given.recipe, given.overrides))
    try:
        check_start(config, folder_of(given), [given.ranks or args.gpus or 1] * args.nodes, is_fresh=given.fresh)
    except OSError as error:
        print(f"warning: not all of the command could be checked here: {in_words(error)}", file=sys.stderr)
