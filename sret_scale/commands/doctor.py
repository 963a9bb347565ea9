"""`sret-scale doctor`: finds what would cost hours later, on this machine or on all nodes, and says what to do."""

import argparse
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sret_scale.launch.doctor.checks import Finding

EXAMPLE = """example: sret-scale doctor --hostfile hosts --folder runs --shards shards/train

Exit status: 0 when nothing failed, 1 otherwise."""
_PROBE = "sret_scale.launch.doctor.rank_probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to look."""
    parser.add_argument("--hostfile", type=Path, help="check all hosts in this file together (default: this machine)")
    parser.add_argument("--ranks", type=int, help="number of ranks on this machine (default: one per GPU, or 2 on CPU)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where runs are written; all nodes must share it"
    )
    parser.add_argument(
        "--shards", type=Path, action="append", default=[], help="a shard folder to check; may be given repeatedly"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print how the ranks would be started, and start nothing"
    )
    parser.add_argument(
        "--teacher", help="a teacher to load on every node; it must have the classes of the first --shards"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line a check; 1 if one failed."""
    from sret_scale.launch.doctor.checks import check_machine
    from sret_scale.launch.doctor.inputs import check_shards

    if args.teacher and not args.shards:
        raise ValueError("--teacher needs --shards: the teacher is checked against their classes")
    if args.dry_run:
        return _dry_run(args)
    failed = 0
    for finding in (*check_machine(args.folder), *check_shards(args.shards), *check_ranks(args)):
        print(finding.line(), flush=True)
        failed += finding.state == "fail"
    print(f"{failed} checks failed" if failed else "nothing found that would stop a run")
    return int(failed > 0)


def _request(args: argparse.Namespace) -> str:
    """What the ranks are to look at, as JSON."""
    shards = [str(shards.resolve()) for shards in args.shards]
    return json.dumps({"folder": str(args.folder.resolve()), "shards": shards, "teacher": args.teacher})


def _dry_run(args: argparse.Namespace) -> int:
    """Starts and writes nothing."""
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.launcher import launch

    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.yaml"
        config.write_text(_request(args), encoding="utf-8")
        return launch(
            args.folder, config, num_ranks=args.ranks, hosts=hosts_of(args.hostfile), module=_PROBE, dry_run=True
        )


def check_ranks(args: argparse.Namespace) -> "Iterator[Finding]":
    """Starts ranks as a run would, which measure and meet each other; one on every node also checks that node."""
    from data_pipelines.checked_files import read_checked
    from sret_scale.launch.doctor.checks import Finding
    from sret_scale.launch.doctor.measured import Probe, judge
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.launcher import launch

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=args.folder) as temporary:
        folder = Path(temporary).resolve()
        config = folder / "config.yaml"
        config.write_text(_request(args), encoding="utf-8")
        try:
            status = launch(folder, config, num_ranks=args.ranks, hosts=hosts_of(args.hostfile), module=_PROBE)
        except (ValueError, OSError) as error:
            yield Finding(name="start", state="fail", text=str(error))
            return
        if status != 0:
            yield Finding(name="start", state="fail", text="the ranks did not finish; the reason is above")
            return
        probes = [read_checked(path, Probe) for path in sorted(folder.glob("probe-*.json"))]
    yield from judge(probes, here=socket.gethostname())
