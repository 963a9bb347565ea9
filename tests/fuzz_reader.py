"""Runs commands on mutated files in a process of bounded memory: `python -m tests.fuzz_reader` reads one JSON a line.

Each line is a list of arguments of the command line; the answer is a line with the exit status and the end of stderr.
"""

import contextlib
import io
import json
import resource
import signal
import sys
import traceback

from sret_scale.cli import main

MOST_BYTES, MOST_S = 2 << 30, 10


def _answer(arguments: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    # Processor time, which other work on the machine does not spend; the clock for what only waits.
    signal.setitimer(signal.ITIMER_PROF, MOST_S)
    signal.alarm(10 * MOST_S)
    try:
        with contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
            status = main(arguments)
    except (Exception, SystemExit):
        return -1, errors.getvalue()[-300:] + traceback.format_exc()[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return status, errors.getvalue()[-3000:]


def _too_long(_signal: int, _frame: object) -> None:
    raise AssertionError(f"longer than {MOST_S} s of processor time, or {10 * MOST_S} s")


if __name__ == "__main__":
    import torch

    # Imported before the clock starts: on a slow machine what a first command imports would take all of its time.
    import torch._dynamo

    import sret_scale.commands.evaluate
    import sret_scale.distill
    import sret_scale.lab.report.page
    import sret_scale.train.load_run  # noqa: F401

    torch.set_num_threads(1)
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    # Libraries map gigabytes of addresses that nobody touches: the bound is on what a command adds.
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, mapped + MOST_BYTES))
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
