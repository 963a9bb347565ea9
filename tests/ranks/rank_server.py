"""Ranks of tests, forked off one process that has imported torch and DeepSpeed: `python -m tests.ranks.rank_server`.

Reads a line of JSON for each job from its input and answers with the exit status of every rank. A fork begins where a
new interpreter would be after two seconds of imports, and shares nothing with other jobs.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any

PRELOADED = (
    # What `sret_scale.train.main` imports; itself it must not be there yet, because a rank runs it as its program.
    *("sret_scale.train.engine.engine", "sret_scale.train.loop"),
    # What is imported late, by DeepSpeed for any optimizer, the measurement of a step and images: seconds of a rank.
    *("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "data_pipelines.image.torchvision_door"),
)
FAILURE_GRACE_S = 10.0
"""How long the other ranks may live after one failed, as below the agent of a node."""


def be_rank(job: dict[str, Any], rank: dict[str, Any]) -> int:
    """What the forked process does: `python -m MODULE ARGUMENTS`; returns its exit status."""
    module, arguments = job["module"], job["arguments"]
    os.environ.clear()
    os.environ.update(job["environment"] | rank["environment"])
    os.chdir(job["folder"])
    for descriptor, path in ((0, os.devnull), (1, rank["output"]), (2, rank["errors"])):
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
            status = be_rank(job, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return wait_for_all(children)


def wait_for_all(children: list[int]) -> list[int]:
    """Their exit statuses; what still runs `FAILURE_GRACE_S` after one failed waits for it in vain, and is killed."""
    statuses: dict[int, int] = {}
    deadline_s = float("inf")
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(ended[1])
        if any(statuses.values()):
            deadline_s = min(deadline_s, time.monotonic() + FAILURE_GRACE_S)
        if time.monotonic() > deadline_s:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def main() -> None:
    # DeepSpeed prints while it is imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
