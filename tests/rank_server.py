"""Rank processes of tests, forked off one process that has imported torch and DeepSpeed: `python -m tests.rank_server`.

Reads a line of JSON for each job from its input and answers with the exit status of every rank. A fork begins where a
new interpreter would be after two seconds of imports, and shares nothing with other jobs.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any


def be_rank(module: str, arguments: list[str], environment: dict[str, str], errors: str) -> int:
    """What the forked process does: `python -m MODULE ARGUMENTS`; returns its exit status."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_job(job: dict[str, Any]) -> list[int]:
    """The exit status of each rank of a job."""
    children = []
    for rank in job["ranks"]:
        child = os.fork()
        if child == 0:
            status = be_rank(job["module"], job["arguments"], job["environment"] | rank["environment"], rank["errors"])
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    # DeepSpeed prints while it is imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    importlib.import_module("sret_scale.train.engine")
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
