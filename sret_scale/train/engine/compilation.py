"""Whether a run computes with compiled blocks (`train.compile`), where their code is kept, and what they cost."""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from sret_scale.config.run_config import RunConfig
from sret_scale.model import StackModel, describe
from sret_scale.model.compiled_blocks import compile_blocks, why_not_compiled
from sret_scale.train.distributed import Ranks, from_all_ranks

AUTO_FLOPS = 50 * 60.0 * 50e9
"""50 times a minute, in which a core compiles the graphs of SReT-T (`benchmarks.compile`: 43 s), at what a core makes
of its products (`benchmarks.model`: 45 to 90 GFLOP/s). The number of ranks is left out: each compiles for itself, and
a run that goes on with others stays what it is."""


class Compiled:
    """What this process has compiled so far."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._num_graphs = 0
        self._seconds = 0.0

    def news(self) -> str | None:
        """What was compiled since the last call, in a line; None if nothing was."""
        counters, spent_ns = torch._dynamo.utils.counters, torch._dynamo.utils.cumulative_time_spent_ns
        num_graphs = counters["stats"]["unique_graphs"] - self._num_graphs
        phases = ("entire_frame_compile", "entire_backward_compile")
        seconds = sum(spent_ns[phase] for phase in phases) / 1e9 - self._seconds
        if not num_graphs:
            return None
        self._num_graphs += num_graphs
        self._seconds += seconds
        return f"compiled {num_graphs} graphs of blocks in {seconds:.1f} s; their code is kept in {self.cache}"


def check_compile(config: RunConfig) -> None:
    """Raise ValueError where train.compile=blocks cannot be."""
    if config.train.compile == "blocks" and (reason := _hindrance(config)):
        raise ValueError(f"train.compile=blocks does not work with {reason}: change one of the two")


def wants_compiled(config: RunConfig, device_type: str) -> bool:
    """What train.compile means for this run on such a device."""
    if config.train.compile != "auto":
        return config.train.compile == "blocks"
    if _hindrance(config):
        return False
    # Forward one multiply-add, backward two, of two operations each.
    return device_type != "cpu" or 6.0 * describe(config.model)["macs"] * config.train.total_images > AUTO_FLOPS


def _hindrance(config: RunConfig) -> str | None:
    if config.model.kind == "timm":
        return f"timm:{config.model.name}, whose blocks are not ours to compile"
    if config.model.dropout:
        return "model.dropout, whose masks are drawn inside the blocks"
    if config.memory.is_checked:
        return "memory.is_checked=true, since graphs with and without a tape differ by rounding"
    return None


def compile_model(model: nn.Module, config: RunConfig, ranks: Ranks) -> Compiled | None:
    """Compiles the blocks of `model` at their first use, on all ranks or on none; None where they stay eager.

    Where they should be compiled and cannot, rank 0 prints the reason.
    """
    if not wants_compiled(config, ranks.device.type):
        return None
    assert isinstance(model, StackModel)
    if reasons := [found for found in from_all_ranks(why_not_compiled(model)) if found]:
        if ranks.is_main:
            print(f"blocks are not compiled: {reasons[0]}", flush=True)
        return None
    cache = use_cache()
    compile_blocks(model)
    if ranks.device.type == "cpu":
        # A graph has one or two kernels: a pool of processes that compile has nothing to share out.
        torch._inductor.config.compile_threads = 1
    return Compiled(cache)


def use_cache() -> Path:
    """The folder of compiled code for this process: the environment's, the user's, or a new one where neither will do.

    torch's default lies in the machine's /tmp, where it is gone with the next start.
    """
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 (homeless: no error)
    folder = home / "sret_scale" / "compiled"
    with contextlib.suppress(OSError):
        if folder.is_absolute():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What lies there is loaded as code: it must be ours, and nobody else may write there.
    if not folder.is_dir() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix="sret_scale_compiled_"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder
