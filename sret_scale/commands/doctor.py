"""`sret-scale doctor`: finds what would cost hours later, on this machine or on all nodes, and says what to do."""

import argparse
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sret_scale.launch.doctor.checks import Finding

EXAMPLE = """example: sret-scale doctor --hostfile hosts --folder runs --shards shards/train

Exit status: 0 when nothing failed, 1 otherwise."""


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
        return _answers(args, args.folder)[0]
    failed = 0
    for finding in (*check_machine(args.folder), *check_shards(args.shards), *check_ranks(args)):
        print(finding.line(), flush=True)
        failed += finding.state == "fail"
    print(f"{failed} checks failed" if failed else "nothing found that would stop a run")
    return int(failed > 0)


def _answers(args: argparse.Namespace, folder: Path) -> tuple[int, Any]:
    """(exit status, what every rank measured), asked of ranks that are started as a run's are."""
    from sret_scale.launch.doctor.rank_probe import probe_rank
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.requests import ask

    shards = [str(shards.resolve()) for shards in args.shards]
    request = {"folder": str(args.folder.resolve()), "shards": shards, "teacher": args.teacher}
    hosts = hosts_of(args.hostfile)
    return ask(probe_rank, request, folder, num_ranks=args.ranks, hosts=hosts, dry_run=args.dry_run)


def check_ranks(args: argparse.Namespace) -> "Iterator[Finding]":
    """Starts ranks as a run would, which measure and meet each other; one on every node also checks that node."""
    from pydantic import TypeAdapter

    from sret_scale.launch.doctor.checks import Finding
    from sret_scale.launch.doctor.measured import Probe, judge

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=args.folder) as temporary:
        try:
            status, probes = _answers(args, Path(temporary).resolve())
        except (ValueError, OSError) as error:
            yield Finding(name="start", state="fail", text=str(error))
            return
    if status != 0:
        yield Finding(name="start", state="fail", text="the ranks did not finish; the reason is above")
        return
    yield from judge(TypeAdapter(list[Probe]).validate_python(probes), here=socket.gethostname())
