"""Which nodes a run starts on, and the command that starts the agent on each: here, by ssh, or by srun."""

import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sret_scale.launch.allocation import granted_hosts, is_reached_by_srun, processors_per_node
from sret_scale.launch.hostfile import Host, check_host_name
from sret_scale.runs.rank_errors import counted

_AGENT = (sys.executable, "-u", "-P", "-m", "sret_scale.launch.agent")
# What a remote node is given of this environment (inside Slurm srun passes all). Names, then beginnings of names.
# W&B's key is none of them: it is read from ~/.netrc there.
_PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "CUDA_HOME", "DS_ACCELERATOR"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"),
)
_PASSED_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "TORCHINDUCTOR_", "TRITON_")
# Below the kernel's range for outgoing connections, which begins at 32768.
_PORTS = range(20_000, 32_000)
_LOCAL_NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True, kw_only=True)
class NodeStart:
    """How the agent of one node is started; `node_rank` is None where one command starts all nodes."""

    name: str
    command: tuple[str, ...]
    node_rank: int | None
    is_remote: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """The nodes of a run, in rank order."""

    hosts: tuple[Host, ...]
    starts: tuple[NodeStart, ...]
    master_addr: str
    master_port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks_of_nodes(self) -> list[int]:
        """How many ranks each node has."""
        return [len(host.devices) for host in self.hosts]

    def check_reachable(self, run_folder: Path) -> None:
        """Raises OSError that names the first host which ssh cannot reach, or which lacks Python or the run folder."""
        problems = list(self.problems(run_folder).values())
        if problems:
            more = f" (and {len(problems) - 1} more hosts)" if len(problems) > 1 else ""
            raise OSError(problems[0] + more)

    def problems(self, run_folder: Path) -> dict[str, str]:
        """Host name -> what is wrong with it, for those that cannot take part."""
        remote = [start.name for start in self.starts if start.is_remote]
        with ThreadPoolExecutor(max_workers=max(1, min(64, len(remote)))) as pool:
            found = pool.map(lambda name: _problem(name, run_folder), remote)
            return {name: problem for name, problem in zip(remote, found, strict=True) if problem}


def choose_nodes(*, num_ranks: int | None = None, hosts: Sequence[Host] = (), is_preview: bool = False) -> Place:
    """The hosts of a hostfile if any are given, else the Slurm allocation if there is one, else this machine.

    is_preview: nothing is started, and the hosts need no address here.
    """
    if num_ranks is not None and num_ranks < 1:
        raise ValueError(f"number of ranks: expected at least 1, got {num_ranks}")
    if hosts:
        if num_ranks is not None:
            raise ValueError("give a hostfile or a number of ranks, not both: the hostfile's slots are the ranks")
        return _from_hosts(tuple(hosts), is_preview)
    if is_reached_by_srun():
        return _from_slurm(num_ranks)
    return _this_machine(num_ranks)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, or all that nvidia-smi lists; without importing torch (1.5 s)."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        return ()
    return tuple(listed.stdout.split()) if chosen is None else tuple(name for name in chosen.split(",") if name)


def ssh_command(name: str, remote: str) -> list[str]:
    """ssh that never asks and notices a lost host within 20 s; SRET_SCALE_SSH_CONFIG names another configuration."""
    own = os.environ.get("SRET_SCALE_SSH_CONFIG")
    options = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
    config = ["-F", own] if own else []
    return ["ssh", "-T", *config, *(part for option in options for part in ("-o", option)), "--", name, remote]


def _this_machine(num_ranks: int | None) -> Place:
    gpus = visible_gpus()
    if gpus and num_ranks is not None and num_ranks > len(gpus):
        raise ValueError(f"number of ranks: expected at most {len(gpus)}, one a GPU, got {num_ranks}")
    devices = gpus[:num_ranks] if gpus else tuple(str(index) for index in range(num_ranks or 2))
    # Nobody else can reach a run that talks to itself.
    environment = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return Place(
        hosts=(Host(name="localhost", devices=devices),),
        starts=(NodeStart(name="localhost", command=_AGENT, node_rank=0),),
        master_addr="127.0.0.1",
        master_port=_free_local_port(),
        environment=environment,
    )


def _from_hosts(hosts: tuple[Host, ...], is_preview: bool) -> Place:
    here = {*_LOCAL_NAMES, socket.gethostname()}
    if len(hosts) > 1 and any(host.name in _LOCAL_NAMES for host in hosts):
        raise ValueError("the hostfile mixes localhost with other hosts; name this machine as the others know it")
    remote = shlex.join(["env", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", *_AGENT])
    starts = tuple(
        NodeStart(name=host.name, command=_AGENT, node_rank=index)
        if host.name in here
        else NodeStart(name=host.name, command=tuple(ssh_command(host.name, remote)), node_rank=index, is_remote=True)
        for index, host in enumerate(hosts)
    )
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES) or name == "PYTHONPATH"
    }
    return Place(
        hosts=hosts,
        starts=starts,
        master_addr=_chosen_address() or _master_address([host.name for host in hosts], is_preview),
        master_port=random.SystemRandom().choice(_PORTS),
        environment=passed,
    )


def _from_slurm(num_ranks: int | None) -> Place:
    """One agent a node of the allocation, all started by one srun."""
    hosts = granted_hosts(num_ranks)
    # The allocation gives the agent what the job has on every node; its ranks share it.
    srun = ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", "--overlap"]
    srun += [f"--cpus-per-task={processors_per_node(len(hosts))}", "--cpu-bind=none", "--kill-on-bad-exit=0"]
    return Place(
        hosts=hosts,
        starts=(NodeStart(name=counted(len(hosts), "node"), command=(*srun, *_AGENT), node_rank=None),),
        master_addr=_chosen_address() or hosts[0].name,
        master_port=_PORTS[int(os.environ["SLURM_JOB_ID"]) % len(_PORTS)],
    )


def _free_local_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _address_of(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, family=socket.AF_INET)[0][4][0])
    except socket.gaierror as error:
        raise OSError(f"host {name} of the hostfile has no address here ({error.strerror}); check its name") from error


def _chosen_address() -> str:
    """MASTER_ADDR of the environment, for clusters where a node's name leads to the wrong network; else empty."""
    chosen = os.environ.get("MASTER_ADDR", "")
    return check_host_name(chosen, "MASTER_ADDR") if chosen else ""


def _master_address(names: list[str], is_preview: bool) -> str:
    """The first host's address, as the others know it: Debian gives a machine's own name the address 127.0.1.1."""
    try:
        address = _address_of(names[0])
    except OSError:
        if not is_preview:
            raise
        return names[0]
    if address.startswith("127.") and len(names) > 1 and names[0] == socket.gethostname():
        return own_address(_address_of(names[1]))
    return address


def own_address(target: str) -> str:
    """This machine's address on the way to `target`; OSError where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # No packet is sent: connecting a datagram socket only chooses the route.
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


def _problem(name: str, run_folder: Path) -> str | None:
    """What is wrong with a host, or None."""
    python, folder = shlex.quote(sys.executable), shlex.quote(str(run_folder))
    test = f"test -x {python} || exit 3; test -d {folder} || exit 4; test -d {shlex.quote(str(Path.cwd()))} || exit 5"
    try:
        answer = subprocess.run(
            ssh_command(name, test), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30
        )
    except subprocess.TimeoutExpired:
        return f"host {name} did not answer within 30 s; check that it is up and that ssh needs no password"
    except FileNotFoundError:
        answer = subprocess.CompletedProcess((), 127, "", "there is no ssh here: install it, such as openssh-client")
    reasons = {
        3: f"host {name} has no {sys.executable}; put the project on a folder that all hosts share",
        4: f"host {name} does not see the run folder {run_folder}; use a folder that all hosts share",
        5: f"host {name} does not see the working folder {Path.cwd()}; use a folder that all hosts share",
    }
    if answer.returncode == 0:
        return None
    words = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    unreachable = (
        f"host {name} was not reached by ssh ({words}); check its name, that it is up, and ssh without password"
    )
    return reasons.get(answer.returncode, unreachable)
