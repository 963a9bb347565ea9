"""The one door to torch.distributed: who this process is, and the few collectives that the training code needs."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn.functional

Group = dist.ProcessGroup | None
"""A process group, or the job's own one."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job; without a launcher a world of one."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """The place that the launcher wrote into RANK, LOCAL_RANK and WORLD_SIZE; the rank's GPU is made current."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=local_rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        device=device,
    )


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than the slowest rank's evaluation or first compile, short enough that a lost rank ends the job."""


def join_ranks(ranks: Ranks, backend: str) -> None:
    """Make the process group of all ranks, through a store that rank 0 opens on the job's own address only.

    torch's default store listens on every interface of the machine, and whoever reaches it can write into it.
    Raises OSError when rank 0 cannot listen there.
    """
    address = _reachable_address(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    port = int(os.environ.get("MASTER_PORT", "0"))
    listener = None
    if ranks.is_main:
        listener = _listen(address, port)
        port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not re-exported by name
        address,
        port,
        ranks.world_size,
        ranks.is_main,
        timeout=COLLECTIVE_TIMEOUT,
        # The store owns the descriptor from here on.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=COLLECTIVE_TIMEOUT
    )


def _reachable_address(address: str) -> str:
    """The IPv4 address of `address` that ranks on every node can use.

    On Debian a machine's own name leads to 127.0.1.1, where only itself would get through: there, on rank 0's node, it
    is the address of the interface that the job was given.
    """
    resolved = str(socket.getaddrinfo(address, None, family=socket.AF_INET)[0][4][0])
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if resolved.startswith("127.") and interface != "lo":
        for found in psutil.net_if_addrs().get(interface, ()):
            if found.family == socket.AF_INET:
                return str(found.address)
    return resolved


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"rank 0 cannot listen on {address}:{port} ({error.strerror}): MASTER_ADDR must be an address of the "
            "first node, and the port free",
        ) from error
    listener.listen(4096)
    return listener


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place; every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def differentiable_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks, whose gradient is summed over them too; every rank must call both."""
    if not dist.is_initialized():
        return values
    summed: torch.Tensor = torch.distributed.nn.functional.all_reduce(values)  # type: ignore[no-untyped-call]
    return summed


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest `value` of any rank."""
    result = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return float(result)


def from_rank(value: Any, rank: int = 0, *, group: Group = None) -> Any:
    """One rank's `value` (any small picklable object of our own making) on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=rank, group=group)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's `value` (any small picklable object of our own making) in order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def new_cpu_group() -> Group:
    """A second group of all ranks, for CPU tensors and another thread than the training's; every rank must call it."""
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if dist.is_initialized() else None


def gather_fragments(fragment: torch.Tensor, *, group: Group) -> list[torch.Tensor]:
    """On rank 0 the equally large fragments of all ranks in order, elsewhere nothing; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [fragment]
    is_main = dist.get_rank() == 0
    fragments = [torch.empty_like(fragment) for _ in range(dist.get_world_size())] if is_main else []
    dist.gather(fragment, fragments or None, dst=0, group=group)
    return fragments


def whole_from_fragments(fragment: torch.Tensor) -> torch.Tensor:
    """The equal fragments of all ranks, one after another; every rank must call it."""
    fragments = [torch.empty_like(fragment) for _ in range(dist.get_world_size())]
    dist.all_gather(fragments, fragment)
    return torch.cat(fragments)


def barrier() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized():
        # NCCL would guess the device, and warn of it.
        own = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=own)


def leave() -> None:
    """Take the process group down, so that no warning follows a finished run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def owners_of_buffers(module: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Name of a buffer that belongs to a module's state -> its layer, its name there.

    Constants that a module can make again are left out.
    """
    return {
        f"{prefix}.{name}" if prefix else name: (layer, name)
        for prefix, layer in module.named_modules()
        for name, _ in layer.named_buffers(recurse=False)
        if name not in layer._non_persistent_buffers_set
    }


@torch.no_grad()
def average_buffers(live: Mapping[str, torch.Tensor]) -> None:
    """Replace every floating-point buffer (BatchNorm's running statistics) by its mean over the ranks.

    The update of a running mean is linear, so averaging after every step gives the statistics of the global batch's
    means, and all ranks hold the same bits: evaluation, EMA and checkpoints need no rank of their own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [buffer for buffer in live.values() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, values in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
