"""A real Slurm on this machine: munged, slurmctld and two slurmd that pretend to be two nodes.

Partition `low` can be preempted by `high`: its jobs get SIGTERM, 60 s, and are put back into the queue.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

_CONFIG = """
ClusterName=sret
SlurmctldHost={host}
SlurmUser=root
SlurmctldPort=26817
AuthType=auth/munge
# A job that is put back waits as long as its credential could still be used: 2 minutes by default.
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port=26821 CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port=26822 CPUs=2
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node[1-2] MaxTime=60 State=UP PriorityTier=9
"""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def why_not() -> str:
    """Why Slurm cannot run here; empty when it can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"{', '.join(missing)} not installed: run tests/cluster/install.sh" if missing else ""


class Slurm:
    """The cluster inside the `with`; `folder` holds its configuration and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Slurm":
        host = os.uname().nodename
        (self.folder / "slurm.conf").write_text(_CONFIG.format(folder=self.folder, host=host))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        own = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        socket = f"--socket={self.folder}/munge.socket"
        # --force: temporary folders may be written by others, which munged does not like.
        self._start("munged", "--foreground", "--force", socket, *own)
        time.sleep(1)
        self._start("slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            (self.folder / f"spool-{node}").mkdir()
            self._start("slurmd", "-D", "-N", node)
        try:
            self._wait(lambda: set(self.run("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}, 60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        subprocess.run(["scancel", "--full", "--user=root"], env=self.environment, check=False)
        time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=30)

    def run(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def submit(self, text: str, *options: str) -> int:
        """The id of a new job; its output goes to job-ID.log."""
        script = self.folder / "job.sh"
        script.write_text(text)
        output = f"--output={self.folder}/job-%j.log"
        return int(self.run("sbatch", "--parsable", output, *options, str(script)).strip())

    def state(self, job: int) -> str:
        """Slurm's word for a job, for example PENDING or COMPLETED."""
        match = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", str(job)))
        assert match is not None
        return match[1]

    def log(self, job: int) -> str:
        """What a job has printed."""
        path = self.folder / f"job-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: int, states: Sequence[str], timeout_s: float) -> str:
        """Waits until a job is in one of the states."""
        self._wait(lambda: self.state(job) in states, timeout_s)
        return self.state(job)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, self.run("squeue") + self.run("sinfo")
            time.sleep(0.5)

    def _start(self, *command: str) -> None:
        environment = {**self.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._daemons.append(daemon)
