"""The agent of one node: starts DeepSpeed's launcher, passes a request to stop on to the ranks, ends what is left.

It is told what to do on stdin: the job as one line, then `stop` or `kill`. The end of stdin means that whoever asked is
gone (a killed launcher, a broken ssh connection), and counts as `stop`. It writes an error record for a rank that ended
without one.
"""

import contextlib
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from data_pipelines.parent_death import die_with_parent
from sret_scale.launch.job import Job, deepspeed_command
from sret_scale.launch.nodes import own_address, visible_gpus
from sret_scale.runs.rank_errors import RankError, first_error, has_error, now_s, write_error
from sret_scale.runs.stop_signals import STOP_SIGNALS, stop_signals

# DeepSpeed's launcher looks every second and then the exit status is gone: a short look seldom comes too late.
_POLL_S = 0.02


class RankProcesses:
    """The rank processes below DeepSpeed's launcher, and what became of them."""

    def __init__(self, launcher_pid: int, job: Job, expected: int) -> None:
        self.job = job
        self.expected = expected
        self.launcher = psutil.Process(launcher_pid)
        self.alive: dict[int, psutil.Process] = {}
        """Rank -> its process."""
        self.vanished: dict[int, float] = {}
        """Rank -> when it was last seen alive, for those that have ended."""
        self.seen_s = now_s()

    @property
    def have_started(self) -> bool:
        """True when a rank was ever seen."""
        return bool(self.alive or self.vanished)

    def poll(self) -> dict[int, int]:
        """The ranks that ended since the last call, with their exit status (negative: the signal) where it is known."""
        is_complete = len(self.alive) + len(self.vanished) == self.expected
        # Listing children reads all of /proc, which is too much for every look.
        with contextlib.suppress(psutil.NoSuchProcess):
            known = {process.pid for process in self.alive.values()}
            for child in () if is_complete else self.launcher.children():
                rank = None if child.pid in known else _rank_of(child)
                if rank is not None and rank not in self.vanished:
                    self.alive[rank] = child
        ended = {}
        for rank, process in list(self.alive.items()):
            if not process.is_running():
                # Its parent has read its status.
                self.vanished[rank] = self.seen_s
                del self.alive[rank]
            elif (status := _exit_status(process)) is not None:
                ended[rank] = status
                self.vanished[rank] = self.seen_s
                del self.alive[rank]
        self.seen_s = now_s()
        return ended

    def record(self, suspects: Sequence[int], status: int) -> None:
        """Leaves an error record for a rank that has ended, one of `suspects`, and could not do it itself."""
        if status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                reason += " (by hand, or by the system when memory ran out: see dmesg)"
        else:
            reason = f"ended with status {status} without a message"
        record = RankError(
            # The last moment it was seen alive sorts it before the peers that failed because of it.
            time_s=self.vanished[suspects[0]],
            rank=suspects[0],
            host=socket.gethostname(),
            message=f"rank {' or '.join(map(str, suspects))} {reason}",
            exit_code=1,
        )
        write_error(Path(self.job.run_folder), record)

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks themselves: to DeepSpeed's launcher it would mean failure and a kill after 30 s."""
        for process in self.alive.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _rank_of(process: psutil.Process) -> int | None:
    """The rank of a child of the launcher; None between fork and exec, when it still has its parent's environment."""
    try:
        rank = process.environ().get("RANK")
        return int(rank) if rank is not None and "sret_scale.launch.rank_bootstrap" in process.cmdline() else None
    except psutil.Error:
        return None


def _exit_status(process: psutil.Process) -> int | None:
    """None while it runs, or the status that its parent will read."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        # It has vanished since it was last looked at; the next look says so.
        return None
    # proc(5): state is field 3, exit_code field 52; the text after the name begins with field 3.
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] in "ZX" else None


def _before_launcher() -> None:
    """Slurm sends a signal to every process of a node: to DeepSpeed's launcher it would mean failure.

    It keeps the blocked signals of its parent, and so do the ranks, which unblock them first of all.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start_launcher(job: Job, node_rank: int) -> "subprocess.Popen[bytes]":
    """DeepSpeed's launcher in a session of its own, so that everything it starts can be found and ended."""
    name, devices = list(job.world.items())[node_rank]
    gpus = visible_gpus()
    if job.node_rank is None and len(gpus) >= len(devices):
        # Slurm counts what it grants, and a job's GPUs of a node need not begin at 0.
        job = dataclasses.replace(job, world={**job.world, name: gpus[: len(devices)]})
    environment = {**os.environ, **job.environment}
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(devices))))
    if not gpus:
        # Says what DeepSpeed would find out with a warning from every process.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    interface = job_interface(job)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
        environment.setdefault(variable, interface)
    return subprocess.Popen(
        deepspeed_command(job, node_rank),
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=job.working_folder,
        start_new_session=True,
        preexec_fn=_before_launcher,
    )


def job_interface(job: Job) -> str:
    """The network interface that leads to the job's other nodes; empty when there is no way to tell.

    Without it gloo listens on the address that the own host name has, which on Debian is 127.0.1.1.
    """
    for target in (job.master_addr, *job.world):
        with contextlib.suppress(OSError):
            own = own_address(target)
            if own.startswith("127."):
                continue
            for name, addresses in psutil.net_if_addrs().items():
                if any(address.address == own for address in addresses):
                    return str(name)
    return ""


def end_session(session: int) -> None:
    """Kills every process of a session."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def node_rank_of(job: Job) -> int:
    """This node's place in the job's world, given or found by the name that Slurm has for the node."""
    if job.node_rank is not None:
        return job.node_rank
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if name not in job.world:
        raise ValueError(f"this node is {name!r}, expected one of {', '.join(job.world)}")
    return list(job.world).index(name)


def supervise(launcher: "subprocess.Popen[bytes]", ranks: RankProcesses, requests: "queue.SimpleQueue[str]") -> int:
    """Waits for the launcher's end; returns its exit status. Nothing of its session is alive afterwards."""
    job, folder = ranks.job, Path(ranks.job.run_folder)
    deadline_s = float("inf")
    stopping = False
    request = ""
    while launcher.poll() is None and time.monotonic() < deadline_s:
        failed = {rank: status for rank, status in ranks.poll().items() if status != 0 and not stopping}
        for rank, status in failed.items():
            if not has_error(folder, rank):
                ranks.record([rank], status)
            deadline_s = min(deadline_s, time.monotonic() + job.failure_grace_s)
        if request == "stop" and not stopping and ranks.have_started:
            ranks.ask_to_stop()
            stopping = True
            deadline_s = min(deadline_s, time.monotonic() + job.stop_grace_s)
        elif request == "kill" or (request == "stop" and not ranks.have_started):
            break
        try:
            request = requests.get(timeout=_POLL_S)
        except queue.Empty:
            request = ""
    end_session(launcher.pid)
    status = launcher.wait()
    if status > 0 and not stopping and ranks.vanished and first_error(folder) is None:
        # The launcher was faster than the look at its ranks. It returns the failed rank's status modulo 256.
        earliest = min(ranks.vanished.values())
        suspects = sorted(rank for rank, seen_s in ranks.vanished.items() if seen_s == earliest)
        ranks.record(suspects, status - 256 if status > 128 else status)
    return status


def main() -> int:
    """Reads the job from stdin and sees it through."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        requests.put("stop")

    for number in stop_signals():
        signal.signal(number, on_signal)
    job = Job.from_line(sys.stdin.readline())
    node_rank = node_rank_of(job)
    try:
        launcher = start_launcher(job, node_rank)
    except OSError as error:
        host = socket.gethostname()
        record = RankError(time_s=now_s(), rank=-1, host=host, message=f"host {host}: {error}", exit_code=2)
        write_error(Path(job.run_folder), record)
        return 1

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line.strip())
        requests.put("stop")

    # Started after the launcher: between fork and exec only one thread may exist.
    threading.Thread(target=listen, daemon=True).start()
    ranks = RankProcesses(launcher.pid, job, expected=len(list(job.world.values())[node_rank]))
    return 0 if supervise(launcher, ranks, requests) == 0 else 1


if __name__ == "__main__":
    # The listening thread holds stdin's lock, on which a normal exit would wait.
    status = main()
    sys.stdout.flush()
    os._exit(status)
