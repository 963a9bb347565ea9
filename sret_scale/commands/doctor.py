"""`sret-scale doctor`: finds what would cost hours later, on this machine or on all nodes, and says what to do."""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sret_scale.train.node.checks import Finding

EXAMPLE = """example: sret-scale doctor --hostfile hosts --folder runs --shards shards/train

Exit status: 0 when nothing failed, 1 otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to look."""
    parser.add_argument("--hostfile", type=Path, help="check all hosts of this file together (default: this machine)")
    parser.add_argument("--ranks", type=int, help="ranks on this machine (default: its GPUs, or 2 on CPU)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are written, shared by all nodes")
    parser.add_argument("--shards", type=Path, action="append", default=[], help="a shard folder to check; may repeat")


def run(args: argparse.Namespace) -> int:
    """Print one line a check; 1 if one failed."""
    from sret_scale.train.node.checks import check_machine

    failed = 0
    for finding in (*check_machine(args.folder), *check_shards(args.shards), *check_ranks(args)):
        print(finding.line(), flush=True)
        failed += finding.state == "fail"
    print(f"{failed} checks failed" if failed else "nothing found that would stop a run")
    return int(failed > 0)


def check_shards(folders: Sequence[Path]) -> "Iterator[Finding]":
    """The shard folders are complete: manifest, index, and every tar with its size."""
    from data_pipelines.index import open_shards
    from sret_scale.train.node.checks import Finding

    for folder in folders:
        try:
            shards = open_shards(folder)
        except (ValueError, OSError) as error:
            yield Finding(name="shards", state="fail", text=str(error), advice="sret-scale shards verify says more")
            continue
        text = f"{folder}: {shards.num_samples:,} samples in {shards.num_shards} shards, {shards.num_classes} classes"
        yield Finding(name="shards", state="ok", text=text)


def check_ranks(args: argparse.Namespace) -> "Iterator[Finding]":
    """Starts ranks as a run would, which measure and meet each other."""
    from sret_scale.train.launcher import launch
    from sret_scale.train.node.checks import Finding
    from sret_scale.train.node.hostfile import hosts_of
    from sret_scale.train.node.measured import Probe, judge

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=args.folder) as temporary:
        folder = Path(temporary).resolve()
        config = folder / "config.yaml"
        config.touch()
        module = "sret_scale.train.node.probe"
        try:
            status = launch(folder, config, num_ranks=args.ranks, hosts=hosts_of(args.hostfile), module=module)
        except (ValueError, OSError) as error:
            yield Finding(name="start", state="fail", text=str(error))
            return
        if status != 0:
            yield Finding(name="start", state="fail", text="the ranks did not finish; the reason is above")
            return
        probes = [Probe(**json.loads(path.read_text())) for path in sorted(folder.glob("probe-*.json"))]
    yield from judge(probes)
