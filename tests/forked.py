"""The command line in the process of a test: what it starts on ranks runs in forks of the rank server.

Nothing is different for the command and for the code of a rank, from its first module on. Left out are the processes
between them (a Python that imports torch, the agent of the node, DeepSpeed's launcher) and the imports of every rank,
which together take ten seconds for a run of one. Tests of just these processes use `tests.tiny.sret_scale`.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sret_scale.cli import main
from sret_scale.launch import launcher
from sret_scale.launch.job import Job
from sret_scale.launch.nodes import NodeStart
from tests.runs import ask_rank_server
from tests.tiny import environment


def sret_scale_forked(*arguments: str | Path, cwd: Path) -> CompletedProcess[str]:
    """What `tests.tiny.sret_scale` starts, run to its end."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        for name, value in environment().items():
            patch.setenv(name, value)
        use_forks(patch)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(list(map(str, arguments)))
    return CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


def use_forks(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, whatever this process launches on ranks of this machine runs in forks."""
    patch.setattr(launcher, "_supervise", _run_forks)


def _run_forks(starts: Sequence[NodeStart], job: Job, _requests: list[int]) -> bool:
    """In the place of the agents: all ranks of a job; True when all ended well."""
    (start,) = starts
    assert not start.is_remote
    with tempfile.TemporaryDirectory() as node_folder:
        output = Path(node_folder) / "output"
        shared = {
            **os.environ,
            **job.environment,
            "DS_ACCELERATOR": "cpu",
            "WORLD_SIZE": str(job.world_size),
            "LOCAL_SIZE": str(job.world_size),
            "MASTER_ADDR": job.master_addr,
            "MASTER_PORT": str(job.master_port),
        }
        statuses = ask_rank_server(
            {
                "module": "sret_scale.launch.rank_bootstrap",
                "arguments": [job.run_folder, job.module, *job.arguments],
                "environment": shared,
                "folder": job.working_folder,
                "ranks": [
                    {
                        "environment": {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        "output": str(output) if rank == 0 else os.devnull,
                        "errors": os.devnull,
                    }
                    for rank in range(job.world_size)
                ],
            },
            timeout_s=240,
        )
        print(output.read_text(), end="")
    return not any(statuses)
