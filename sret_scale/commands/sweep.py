"""`sret-scale sweep`: runs a declared experiment, continues it after a stop, and ends with its report."""

import argparse
import functools
import os
import sys
from pathlib import Path

EXAMPLE = """examples:
  sret-scale sweep depth.yaml --dry-run --measure --price-per-hour 2.5
  sret-scale sweep depth.yaml --folder runs/depth --jobs 8
  sret-scale sweep depth.yaml --hostfile hosts --per-gpu
  sret-scale slurm --array 16 --nodes 1 --gpus 1 --cpus 12 --time 12:00:00 -- sweep depth.yaml > job.sh && sbatch job.sh

Such a file:
  base: demo_control_20
  grid: {model.stages.1.num_loops: [2, 4, 8], train.seed: [0, 1, 2]}
  match: equal_flops            (or equal_images, equal_parameters, equal_memory)

The same command continues an interrupted sweep. Exit status: 0 finished, 85 stopped by a signal, 2 bad input,
1 a run failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where runs go and what is printed first; what they compute is the file's."""
    parser.add_argument("experiment", type=Path, help="YAML file with base, grid or runs, match, retries")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="configuration fields to change in all runs"
    )
    parser.add_argument("--folder", type=Path, help="folder of the run folders (default: runs/EXPERIMENT)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many runs at once: each on one GPU (or --ranks of them), on a share of the CPU, or on a host",
    )
    parser.add_argument(
        "--ranks", type=int, help="ranks of each run on this machine (default: as in `train`; 1 with --jobs)"
    )
    parser.add_argument(
        "--hostfile", type=Path, help="nodes, in DeepSpeed's format: each run uses all of them, or with --jobs one"
    )
    parser.add_argument(
        "--per-gpu", action="store_true", help="with --hostfile: one run on every GPU of every node at the same time"
    )
    parser.add_argument(
        "--array-task",
        action="store_true",
        help="do only the run that SLURM_ARRAY_TASK_ID names (what `slurm --array` runs)",
    )
    parser.add_argument(
        "--rehearse",
        metavar="RATIO",
        type=float,
        default=1.0,
        help="try everything out: each run over this share of its images, such as 0.01, in a folder of its own",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that a start would, print the table of runs and their costs, and start nothing",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --dry-run: measure a few steps here again and again, to say between which times runs will take",
    )
    parser.add_argument(
        "--price-per-hour",
        type=float,
        help="with --dry-run: price of one hour of what a run occupies, to estimate the cost",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the sweep's exit status."""
    from data_pipelines.checked_files import printable
    from sret_scale.lab.experiments.declared import load_experiment
    from sret_scale.lab.experiments.pool import run_sweep
    from sret_scale.lab.experiments.refusals import check_all, refusal
    from sret_scale.lab.experiments.run_slots import device_slots, host_slots, local_slots
    from sret_scale.lab.experiments.sweep_view import SweepView
    from sret_scale.lab.report.page import write_report
    from sret_scale.lab.report.run_record import is_run_folder
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.nodes import choose_nodes

    hosts = hosts_of(args.hostfile)
    if args.per_gpu and (not hosts or args.jobs != 1):
        raise ValueError("--per-gpu starts one run on every GPU of a --hostfile: give that file, and no --jobs")
    if hosts and args.ranks is not None:
        raise ValueError("give --hostfile or --ranks, not both: the hostfile's slots are the ranks")
    ranks = _ranks_of_a_run(args, [len(host.devices) for host in hosts])
    ranks = ranks or choose_nodes().ranks_of_nodes
    experiment, planned = load_experiment(args.experiment, ranks, changes=args.overrides, rehearsal=args.rehearse)
    folder = args.folder or Path("runs") / (args.experiment.stem + "_rehearsal" * (args.rehearse < 1))
    if args.dry_run:
        print(printable(_table(args, planned, ranks)))
        check_all(planned, folder, ranks)
        return 0
    for name in ("measure", "price_per_hour"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} belongs to --dry-run: add that, or leave it out")
    if args.array_task:
        planned = [planned[_array_task(len(planned))]]
    if args.per_gpu:
        slots = device_slots(hosts, folder / ".sweep")
    elif hosts:
        slots = host_slots(hosts, args.jobs, args.hostfile, folder / ".sweep")
    else:
        slots = local_slots(args.jobs, args.ranks)
    with SweepView() as view:
        refused = functools.partial(refusal, folder=folder, ranks_of_nodes=ranks)
        status = run_sweep(planned, folder, slots, retries=experiment.retries, view=view, refusal=refused)
    if any(is_run_folder(folder / run.name) for run in planned) and not args.array_task:
        print(f"report: {write_report([folder], folder / 'report.html').page}")
    return status


def _array_task(num_runs: int) -> int:
    """Which run this task of the array is; ValueError outside an array, or in one of another experiment."""
    text = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not text.isdecimal():
        raise ValueError("--array-task: expected SLURM_ARRAY_TASK_ID to be set; submit what `slurm --array` prints")
    if int(text) >= num_runs:
        raise ValueError(f"--array-task: task {text} of an experiment of {num_runs} runs: print the batch file again")
    return int(text)


def _ranks_of_a_run(args: argparse.Namespace, devices: list[int]) -> list[int]:
    """How many ranks each run will have on each of its nodes; empty where the machine alone tells."""
    if args.per_gpu:
        return [1]
    if devices:
        return devices if args.jobs == 1 else devices[:1]
    return [args.ranks or 1] if args.ranks or args.jobs > 1 else []


def _table(args: argparse.Namespace, planned: list, ranks: list[int]) -> str:  # type: ignore[type-arg]
    from sret_scale.lab.experiments.forecast import busy_warning, measure_speeds, sweep_table

    if args.measure and (warning := busy_warning()):
        print(warning, file=sys.stderr)
    speeds = measure_speeds(planned) if args.measure else []
    if args.price_per_hour is not None:
        if not speeds:
            raise ValueError("--price-per-hour needs times: add --measure")
        if not 0 <= args.price_per_hour < float("inf"):
            raise ValueError(f"--price-per-hour: expected 0 or more, got {args.price_per_hour}")
    return sweep_table(planned, ranks_of_nodes=ranks, speeds=speeds, price_per_hour=args.price_per_hour)
