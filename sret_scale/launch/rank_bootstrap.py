"""The first code of every rank: its log, its error record, its end with its parent; then the module that was asked for.

Started as `python -m sret_scale.launch.rank_bootstrap RUN_FOLDER MODULE ARGUMENT...` with RANK in the environment.
Rank 0 keeps the terminal for what it prints; everything else of all ranks goes to RUN_FOLDER/logs/rank-NNNNN.log.
"""

import faulthandler
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.parent_death import die_with_parent
from sret_scale.launch.output import outlast
from sret_scale.runs.rank_errors import RankError, in_words, log_path, now_s, write_error
from sret_scale.runs.stop_signals import STOP_SIGNALS


def redirect_output(run_folder: Path, rank: int) -> None:
    """Sends stderr, and on every rank but 0 also stdout, to the rank's log; C++ libraries included.

    What rank 0 prints goes there too once it cannot be written. A log on a full disk loses lines and ends nothing.
    """
    path = log_path(run_folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for target in (2,) if rank == 0 else (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
    outlast("stdout", path if rank == 0 else os.devnull)
    outlast("stderr")


def run_module(run_folder: Path, module: str, arguments: Sequence[str]) -> int:
    """Runs a module as `python -m` does; returns the exit status and leaves a record of an exception.

    ValueError and OSError are a user's mistake or a machine's refusal: status 2 and the message alone; any other
    exception is 1 with its trace. The log has the trace in both cases.
    """
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException as error:
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        expected = isinstance(error, ValueError | OSError)
        record = RankError(
            time_s=now_s(),
            rank=int(os.environ["RANK"]),
            host=socket.gethostname(),
            message=in_words(error) if expected and str(error) else f"{type(error).__name__}: {error}",
            exit_code=2 if expected else 1,
            trace="" if expected else trace,
        )
        write_error(run_folder, record)
        return record.exit_code
    return 0


def main(argv: Sequence[str]) -> None:
    """Never returns: a failed rank leaves without the exit handlers of libraries, which may wait for lost peers."""
    run_folder = Path(argv[0])
    die_with_parent()
    # Blocked for DeepSpeed's launcher, see the agent; inherited from it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    redirect_output(run_folder, int(os.environ["RANK"]))
    faulthandler.enable()
    status = run_module(run_folder, argv[1], argv[2:])
    if status == 0:
        sys.exit(0)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
