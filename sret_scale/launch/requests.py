"""Work that ranks do on a request, a JSON object: a command asks, every rank answers, rank 0 leaves the result.

    ask -> FOLDER/request.json -> launcher -> `python -m sret_scale.launch.requests REQUEST WORK` on every rank
        <- FOLDER/result.json  <--------------------------------------------------------------------'

The folder takes the place of a run folder for the launcher: status, logs and error records of the work go there.
"""

import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.checked_files import read_checked
from sret_scale.launch.hostfile import Host
from sret_scale.launch.launcher import launch
from sret_scale.runs.run_folder import EXIT_FINISHED, RunFolder, write_json
from sret_scale.train.distributed import Ranks, leave, ranks_from_environment

Work = Callable[[dict[str, Any], Ranks], Any]
"""What every rank does of a request: a function of a module, with the same result on every rank."""


def ask(
    work: Work,
    request: dict[str, Any],
    folder: Path,
    *,
    num_ranks: int | None,
    hosts: Sequence[Host],
    dry_run: bool = False,
) -> tuple[int, Any]:
    """(exit status, result) of `work` on ranks; no result where it failed. A dry run says what would be started."""
    # Told to the ranks in words of the command, not in the file: nothing that a file names is imported.
    words = (f"{work.__module__}:{work.__qualname__}",)
    started: dict[str, Any] = {"num_ranks": num_ranks, "hosts": hosts, "module": __spec__.name, "words": words}
    if dry_run:
        print(f"request:\n{json.dumps(request, indent=1)}")
        return launch(folder, folder / "request.json", **started, dry_run=True), None
    folder.mkdir(exist_ok=True)
    with RunFolder(folder).locked("launch.lock"):
        write_json(folder / "request.json", request)
        status = launch(folder, folder / "request.json", **started)
        return status, None if status else read_checked(folder / "result.json", object)


def answer(file: Path, work: Work) -> None:
    """One rank's share of the request in `file`; rank 0 leaves result.json beside it."""
    request = read_checked(file, dict[str, Any])
    # Importing deepspeed costs seconds, and the command that asks does without it.
    from sret_scale.train.engine.engine import start_communication

    ranks = ranks_from_environment()
    start_communication(ranks)
    result = work(request, ranks)
    if ranks.is_main:
        write_json(file.with_name("result.json"), result)
        RunFolder(file.parent).write_status("finished", EXIT_FINISHED)
    leave()


if __name__ == "__main__":
    answer(Path(sys.argv[1]), pkgutil.resolve_name(sys.argv[2]))
