"""`sret-scale sweep`: runs a declared experiment, continues it after a stop, and ends with its report."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale sweep depth.yaml --dry-run
  sret-scale sweep depth.yaml --folder runs/depth

A file: base: demo_control_20
        grid: {model.stages.1.num_loops: [2, 4, 8], train.seed: [0, 1, 2]}
        match: equal_flops

The same command continues. Exit status: 0 finished, 85 stopped by a signal, 2 bad input, 1 a run failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, help="YAML file with base, grid or runs, match and retries")
    parser.add_argument("--folder", type=Path, help="where the run folders go (default: runs/EXPERIMENT)")
    parser.add_argument("--ranks", type=int, help="ranks of each run on this machine (default: its GPUs, or 2 on CPU)")
    parser.add_argument("--hostfile", type=Path, help="nodes to run on, in deepspeed's format")
    parser.add_argument("--dry-run", action="store_true", help="print the table of runs and what each costs only")


def run(args: argparse.Namespace) -> int:
    """Returns the sweep's exit status."""
    from sret_scale.lab.experiment import load_experiment
    from sret_scale.lab.report import write_report
    from sret_scale.lab.runs import is_run_folder
    from sret_scale.lab.sweep import run_sweep, sweep_table
    from sret_scale.train.config import RunConfig
    from sret_scale.train.node.hostfile import hosts_of
    from sret_scale.train.start import start_run

    experiment, planned = load_experiment(args.experiment)
    if args.dry_run:
        print(sweep_table(planned))
        return 0
    folder = args.folder or Path("runs") / args.experiment.stem

    def start(config: RunConfig, path: Path) -> int:
        return start_run(config, path, num_ranks=args.ranks, hosts=hosts_of(args.hostfile))

    status = run_sweep(experiment, planned, folder, start=start, say=lambda text: print(text, flush=True))
    started = [folder / run.name for run in planned if is_run_folder(folder / run.name)]
    if started:
        print(f"report: {write_report(started, folder / 'report.html').page}")
    return status
