"""Starts a run on its nodes and sees it through: one agent a node, signals, the exit status, the first error last.

The nodes are this machine, the hosts of a hostfile (ssh), or a Slurm allocation (srun). What a run returned stands in
RUN/status.json, written by rank 0; without that file a run has failed, whatever its processes returned.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sret_scale.launch.hostfile import Host
from sret_scale.launch.job import Job, deepspeed_command
from sret_scale.launch.nodes import NodeStart, choose_nodes
from sret_scale.launch.sbatch import requeue_running_job
from sret_scale.runs import rank_errors
from sret_scale.runs.run_folder import RunFolder, read_status
from sret_scale.runs.stop_signals import caught_signals


def launch(
    run_folder: Path,
    config_path: Path,
    *,
    num_ranks: int | None = None,
    hosts: Sequence[Host] = (),
    dry_run: bool = False,
    module: str = "sret_scale.train.main",
    words: tuple[str, ...] = (),
    stop_grace_s: float = 120.0,
) -> int:
    """Run `python -m MODULE CONFIG_PATH WORDS` on every rank by DeepSpeed's launcher; returns the run's exit status.

    `num_ranks` is for this machine alone (default: its GPUs, or 2 ranks on CPU) or the ranks a node inside Slurm.
    SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless this process inherited it as ignored (nohup), reach the ranks as one
    SIGTERM each; a second one, but for SIGHUP, ends them at once.
    Raises ValueError or OSError for what can be said before anything is started.
    """
    run_folder, config_path = run_folder.resolve(), config_path.resolve()
    place = choose_nodes(num_ranks=num_ranks, hosts=hosts, is_preview=dry_run)
    job = Job(
        run_folder=str(run_folder),
        working_folder=str(Path.cwd()),
        module=module,
        arguments=(str(config_path), *words),
        world={host.name: host.devices for host in place.hosts},
        master_addr=place.master_addr,
        master_port=place.master_port,
        environment=place.environment,
        stop_grace_s=stop_grace_s,
    )
    if dry_run:
        print(describe_start(place.starts, job))
        return 0
    run_folder.mkdir(parents=True, exist_ok=True)
    place.check_reachable(run_folder)
    (run_folder / "status.json").unlink(missing_ok=True)
    rank_errors.clear_errors(run_folder)
    with caught_signals() as requests:
        all_ended_well = _supervise(place.starts, job, requests)
        status = exit_status(run_folder, all_ended_well, requests)
    if all_ended_well and read_status(RunFolder(run_folder)).get("state") == "stopped" and "SLURM_JOB_ID" in os.environ:
        requeue_running_job(os.environ["SLURM_JOB_ID"])
    return status


def describe_start(starts: Sequence[NodeStart], job: Job) -> str:
    """What `launch` would do, for --dry-run."""
    ranks, nodes = rank_errors.counted(job.world_size, "rank"), rank_errors.counted(len(job.world), "node")
    lines = [f"{ranks} on {nodes}, rendezvous at {job.master_addr}:{job.master_port}"]
    lines += [f"{name}: devices {','.join(devices)}" for name, devices in job.world.items()]
    for start in starts:
        lines += [f"start on {start.name}: {shlex.join(start.command)}"]
        node_rank = start.node_rank if start.node_rank is not None else 0
        lines += [f"  which runs: {shlex.join(deepspeed_command(job, node_rank))}"]
    lines += [f"environment: {name}={value}" for name, value in sorted(job.environment.items())]
    return "\n".join(lines)


def _tell(agents: Sequence["subprocess.Popen[str]"], text: str) -> None:
    for agent in agents:
        assert agent.stdin is not None
        # An agent that has just ended needs no telling.
        with suppress(BrokenPipeError):
            agent.stdin.write(text)
            agent.stdin.flush()


def _supervise(starts: Sequence[NodeStart], job: Job, requests: list[int]) -> bool:
    """Starts the agents and waits for all; True when all returned 0. None is alive afterwards."""
    agents: dict[str, subprocess.Popen[str]] = {}
    told = 0
    deadline_s = float("inf")
    try:
        for start in starts:
            # A session of their own: Ctrl-C in the terminal reaches this process, which asks the ranks to save.
            agent = subprocess.Popen(start.command, stdin=subprocess.PIPE, text=True, start_new_session=True)
            agents[start.name] = agent
            _tell([agent], dataclasses.replace(job, node_rank=start.node_rank).to_line())
        while time.monotonic() < deadline_s:
            running = [agent for agent in agents.values() if agent.poll() is None]
            if not running:
                break
            lost = [name for name, agent in agents.items() if agent.returncode not in (None, 0)]
            if len(requests) > told:
                print(
                    "stopping: the ranks save their state and end; a second signal ends them at once",
                    file=sys.stderr,
                    flush=True,
                )
                _tell(running, "stop\n" if told == 0 else "kill\n")
                deadline_s = min(deadline_s, time.monotonic() + (job.stop_grace_s + 10 if told == 0 else 10))
                told = len(requests)
            elif lost and deadline_s == float("inf"):
                _note_lost(lost, agents, job)
                # The peers of a lost node hang in a collective; SIGTERM alone would not reach them there.
                _tell(running, "kill\n" if any(agents[name].returncode == 255 for name in lost) else "stop\n")
                deadline_s = time.monotonic() + job.failure_grace_s + 10
            time.sleep(0.1)
    finally:
        _end(list(agents.values()))
    return all(agent.returncode == 0 for agent in agents.values())


def _end(agents: Sequence["subprocess.Popen[str]"]) -> None:
    """Ends agents that still run. One that cannot be told any more notices the end of its stdin and ends its ranks."""
    _tell([agent for agent in agents if agent.poll() is None], "kill\n")
    deadline_s = time.monotonic() + 10
    for agent in agents:
        with suppress(subprocess.TimeoutExpired):
            agent.wait(timeout=max(0.1, deadline_s - time.monotonic()))
        if agent.poll() is None:
            agent.kill()
        agent.wait()
        with suppress(BrokenPipeError):
            assert agent.stdin is not None
            agent.stdin.close()


def _note_lost(names: Sequence[str], agents: dict[str, "subprocess.Popen[str]"], job: Job) -> None:
    """Leaves a record for a host whose ssh connection broke: its ranks cannot."""
    for name in names:
        status = agents[name].returncode
        if status == 255 or status < 0:
            message = f"host {name} was lost (its connection ended with status {status}); see that it is up"
            record = rank_errors.RankError(time_s=rank_errors.now_s(), rank=-1, host=name, message=message, exit_code=1)
            rank_errors.write_error(Path(job.run_folder), record)


def exit_status(run_folder: Path, all_ended_well: bool, requests: Sequence[int]) -> int:
    """The run's exit status; says on stderr what went wrong, the first error last.

    requests: the signals that asked for the end, in their order.
    """
    status = read_status(RunFolder(run_folder))
    code = status.get("exit_code")
    error = rank_errors.first_error(run_folder)
    # A failed rank makes DeepSpeed's launcher send SIGTERM to the others, which then say "stopped" in good faith.
    has_stopped = status.get("state") == "stopped" and all_ended_well and error is None
    if isinstance(code, int) and (status.get("state") == "finished" or has_stopped):
        return code
    if error is not None:
        for line in rank_errors.show_first_error(run_folder, error):
            print(line, file=sys.stderr)
        return error.exit_code or 1
    if requests:
        print("error: stopped before the run could save", file=sys.stderr)
        return 128 + requests[-1]
    ended = "ended well" if all_ended_well else "failed"
    state = status.get("state", "no status.json")
    print(f"error: the run failed: its processes {ended}, and {run_folder} says {state}", file=sys.stderr)
    return code if isinstance(code, int) and code != 0 else 1
