"""Places for the runs of a sweep: each slot takes one run at a time, and what that run is told of its place."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sret_scale.launch.hostfile import Host
from sret_scale.launch.nodes import visible_gpus


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place. `arguments` are those of `sret-scale train`; `environment` is added to this process's own."""

    name: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def local_slots(jobs: int, ranks: int | None) -> list[Slot]:
    """`jobs` slots on this machine of `ranks` ranks each, with GPUs of their own where the machine has some.

    A single slot leaves the ranks to `train`; of several each has one rank unless told otherwise.
    Raises ValueError where the GPUs do not suffice.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, got {ranks}")
    if jobs == 1:
        return [Slot(name="here", arguments=() if ranks is None else ("--ranks", str(ranks)))]
    each, gpus = ranks or 1, visible_gpus()
    if gpus and jobs * each > len(gpus):
        raise ValueError(
            f"--jobs {jobs} with {each} ranks each: expected at most {len(gpus)} ranks at once, one a GPU; use "
            f"--jobs {len(gpus) // each or 1}"
        )
    slots = []
    for index in range(jobs):
        own = gpus[index * each : (index + 1) * each]
        slots.append(
            Slot(
                name="GPU " + ",".join(own) if own else f"slot {index}",
                arguments=("--ranks", str(each)),
                environment={"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else _share_of_cores(jobs * each),
            )
        )
    return slots


def _share_of_cores(ranks: int) -> dict[str, str]:
    """One process that takes all cores is fast, several that do are slower than on one core each."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}


def host_slots(hosts: Sequence[Host], jobs: int, hostfile: Path, folder: Path) -> list[Slot]:
    """One slot on all hosts for a single job; for several, one slot on each of the first `jobs` hosts.

    The launcher starts a run on another node as on this one; `folder` takes the hostfiles of one line, and the run
    folders must be on a disk that the nodes share. Raises ValueError for more jobs than hosts.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    if jobs == 1:
        return [Slot(name=f"{len(hosts)} hosts", arguments=("--hostfile", str(hostfile)))]
    if jobs > len(hosts):
        raise ValueError(f"--jobs {jobs}: expected at most one for each of the {len(hosts)} hosts of {hostfile}")
    return [_on_devices(host, host.devices, folder, name=host.name) for host in hosts[:jobs]]


def device_slots(hosts: Sequence[Host], folder: Path) -> list[Slot]:
    """One slot on every device of every host: many small runs share a node, its page cache and its shards.

    `folder` takes the hostfiles. Each run computes on its share of a node's cores, which are taken to be as many as
    here.
    """
    return [
        _on_devices(host, (device,), folder, name=f"{host.name} {device}", among=len(host.devices))
        for host in hosts
        for device in host.devices
    ]


def _on_devices(host: Host, devices: Sequence[str], folder: Path, *, name: str, among: int = 1) -> Slot:
    """A slot on these devices of a host that `among` runs share."""
    file = folder / f"host_{name.replace(' ', '_')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{host.name} devices={','.join(devices)}\n", encoding="ascii")
    environment = _share_of_cores(among) if among > 1 else {}
    return Slot(name=name, arguments=("--hostfile", str(file)), environment=environment)
