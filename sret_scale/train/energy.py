"""Energy that a run's machines drew, where they tell: the kernel's counters of CPUs (RAPL), NVML's of GPUs.

RAPL counts a whole node, other programs included; NVML a whole GPU. Neither knows of fans, disks or losses of the
power supply. Linux shows RAPL's counters to root only, unless the machine's owner opened them.
"""

import importlib
import importlib.util
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
POLL_S = 30.0
"""A counter of 2^32 units of 61 microjoules wraps after about 11 minutes at 400 W: it is read long before."""

Counter = Callable[[], float]
"""Joules since some moment, ever rising."""


class WrappingCounter:
    """One RAPL zone in joules since it was made. Read it at least once in each of its rounds."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._round_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj, self._sum_uj = self._read_uj(), 0

    def _read_uj(self) -> int:
        return int(self._file.read_text())

    def __call__(self) -> float:
        now_uj = self._read_uj()
        self._sum_uj += now_uj - self._last_uj + (self._round_uj if now_uj < self._last_uj else 0)
        self._last_uj = now_uj
        return self._sum_uj / 1e6


def cpu_counters(root: Path) -> list[Counter]:
    """Counters of all packages and their memory under a powercap folder; none where it does not tell of all of them.

    Cores and graphics lie inside their package, `psys` holds everything: counting these too would count twice.
    """
    try:
        names = {zone: (zone / "name").read_text().strip() for zone in sorted(root.glob("intel-rapl:*"))}
        zones = [zone for zone, name in names.items() if name.startswith("package") or name == "dram"]
        return [WrappingCounter(zone) for zone in zones]
    except (OSError, ValueError):
        # Closed to this user, or a driver that answers with an error or with nothing.
        return []


def gpu_counters(device: torch.device) -> list[Counter]:
    """The counter of one GPU; none without NVML's Python package (nvidia-ml-py), or where the GPU has no counter."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return []
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        # By its UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        start_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return []

    def joules() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start_mj) / 1e3
        except nvml.NVMLError as error:
            raise OSError(f"NVML tells no energy: {error}") from error

    return [joules]


class EnergyMeter:
    """What one rank can tell, in joules since the `with` began: the CPUs of its node if it is the first there, GPUs.

    devices: those that this rank tells of: its own, and of ranks that only run a teacher, which write no metrics.
    before: what earlier starts of the run drew, by kind; None where one of them could not tell.
    """

    def __init__(
        self, devices: Sequence[torch.device], *, is_first_on_node: bool, before: Mapping[str, float | None]
    ) -> None:
        of_gpus = [gpu_counters(device) for device in devices if device.type == "cuda"]
        self.is_first_on_node, self.has_gpu = is_first_on_node, bool(of_gpus)
        self.before = before
        self._counters = {
            "cpu_j": cpu_counters(POWERCAP) if is_first_on_node else [],
            "gpu_j": [counter for counters in of_gpus for counter in counters] if all(of_gpus) else [],
        }
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="energy", daemon=True)

    def __enter__(self) -> "EnergyMeter":
        if self._counters["cpu_j"]:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _poll(self) -> None:
        while not self._is_over.wait(POLL_S):
            self.read()

    def read(self) -> dict[str, float | None]:
        """Joules of each kind since the start; None where this rank should tell and cannot, 0 where others do.

        A counter that fails once tells nothing any more: what was drawn in between is not known, and no run may end
        for want of it.
        """
        expected = {"cpu_j": self.is_first_on_node, "gpu_j": self.has_gpu}
        found: dict[str, float | None] = {}
        with self._lock:
            for kind, counters in self._counters.items():
                try:
                    spent_j = sum(counter() for counter in counters)
                except (OSError, ValueError):
                    self._counters[kind] = counters = []
                    spent_j = 0.0
                found[kind] = None if expected[kind] and not counters else spent_j
        return found


def spent_before(metrics: Path) -> dict[str, float | None]:
    """The newest energy record of a run's metrics.jsonl, steps that were repeated included; zeros in a new run.

    None for a kind of which an earlier start wrote nothing.
    """
    found: dict[str, float | None] = {"cpu_j": 0.0, "gpu_j": 0.0}
    if not metrics.exists():
        return found
    for line in metrics.read_bytes().split(b"\n"):
        if b'"energy"' in line:
            try:
                record = json.loads(line)
            except ValueError:
                # A kill cut it off; the one before holds.
                continue
            found = {kind: record[kind] for kind in found}
    return found


def added(before: float | None, now: float | None) -> float | None:
    """The sum in joules; None where either is not known."""
    return None if before is None or now is None else round(before + now, 1)
