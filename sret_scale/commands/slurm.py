"""`sret-scale slurm`: prints the batch file that runs a command on a Slurm cluster."""

import argparse
import pkgutil

import sret_scale.commands

EXAMPLE = """example:
  sret-scale slurm --nodes 4 --gpus 8 --cpus 96 --time 1-00:00:00 -- train sret_t_1000 data.train_folder=shards > job.sh
  sbatch job.sh

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
    parser.add_argument(
        "--warning", type=int, default=300, help="how many seconds before the limit to save and requeue (default: 300)"
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="COMMAND", help="a sret-scale command with its arguments, after --"
    )


def run(args: argparse.Namespace) -> None:
    """Print the file; nothing is submitted."""
    from sret_scale.launch.sbatch import BatchOptions, batch_file

    if args.arguments[0] not in (module.name for module in pkgutil.iter_modules(sret_scale.commands.__path__)):
        raise ValueError(f"expected a command of sret-scale after --, such as train, got {args.arguments[0]!r}")
    options = BatchOptions(
        nodes=args.nodes,
        gpus_per_node=args.gpus,
        cpus_per_node=args.cpus,
        time=args.time,
        partition=args.partition,
        account=args.account,
        job_name=args.name,
        warning_s=args.warning,
    )
    print(batch_file(options, args.arguments), end="")
