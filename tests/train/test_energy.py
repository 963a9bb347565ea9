"""Energy: the kernel's and NVML's counters, their wraps, restarts, ranks that cannot tell, and the report of it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sret_scale.lab.report.page import write_report
from sret_scale.runs.run_folder import MetricsLog
from sret_scale.train import energy
from sret_scale.train.assemble import Clock
from sret_scale.train.energy import EnergyMeter, cpu_counters, gpu_counters, spent_before
from sret_scale.train.loop import log_energy
from tests.lab.report_runs import write_run

CPU = torch.device("cpu")
ZEROS = {"cpu_j": 0.0, "gpu_j": 0.0}


def zone(root: Path, place: str, name: str, energy_uj: int, round_uj: int = 10_000_000) -> Path:
    """A RAPL zone as Linux shows it."""
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{round_uj}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_and_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 5_000_000)
    inside = zone(tmp_path, "intel-rapl:0:0", "core", 1)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 1)
    counters = cpu_counters(tmp_path)
    for file, value in ((package, 500_000), (other, 2_000_000), (memory, 5_250_000), (inside, 999), (whole, 999)):
        file.write_text(str(value))
    assert sum(counter() for counter in counters) == pytest.approx(1.5 + 2.0 + 0.25)
    package.write_text("100000")
    assert sum(counter() for counter in counters) == pytest.approx(1.5 + 9.6 + 2.0 + 0.25)


def test_a_machine_that_hides_its_counters_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_counters(tmp_path / "absent") == []
    hidden = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    real = Path.read_text

    def read_text(path: Path) -> str:
        if path == hidden:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert cpu_counters(tmp_path) == []


def test_the_counter_of_a_gpu_is_read_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    readings = iter([1_000_000, 1_002_500])
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings) if handle == "GPU-abc" else 0,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    (counter,) = gpu_counters(torch.device("cuda", 0))
    assert counter() == 2.5

    def refuse(handle: str) -> int:
        raise NVMLError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert gpu_counters(torch.device("cuda", 0)) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    assert gpu_counters(torch.device("cuda", 0)) == gpu_counters(CPU) == []


def put(counter: Path, value_uj: int) -> None:
    """In one step, as the kernel does it: the meter's thread may be reading."""
    (counter.parent / "new").write_text(str(value_uj))
    (counter.parent / "new").replace(counter)


def start(folder: Path) -> SimpleNamespace:
    """What `log_energy` needs of a run that starts in `folder`."""
    meter = EnergyMeter([CPU], is_first_on_node=True, before=spent_before(folder / "metrics.jsonl"))
    ranks = SimpleNamespace(device=CPU, is_main=True)
    return SimpleNamespace(energy=meter, ranks=ranks, metrics=MetricsLog(folder / "metrics.jsonl"))


def test_starts_add_up_repeated_steps_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(energy, "POLL_S", 0.001)
    run_folder = write_run(tmp_path / "run")
    for drawn, step in ((4_000_000, 1), (3_000_000, 2)):
        put(package, 0)
        run = start(run_folder)
        with run.energy, run.metrics:
            put(package, drawn)
            log_energy(run, Clock(step=step, images=64 * step))
        with (run_folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"kind": "energy", "cpu_j": 1')  # a kill
    assert spent_before(run_folder / "metrics.jsonl") == {"cpu_j": 7.0, "gpu_j": 0.0}
    write_report([run_folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "7 J" in page and "CPUs and memory of all nodes: counted" in page
    # A later start on a machine that hides its counters: the sum is not known any more.
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "absent")
    run = start(run_folder)
    with run.energy, run.metrics:
        log_energy(run, Clock(step=3, images=192))
    assert spent_before(run_folder / "metrics.jsonl") == {"cpu_j": None, "gpu_j": 0.0}
    write_report([run_folder], tmp_path / "page.html")
    assert "the machine does not tell" in (tmp_path / "page.html").read_text()


def test_a_rank_that_cannot_tell_silences_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    first = EnergyMeter([CPU], is_first_on_node=True, before=ZEROS)
    second = EnergyMeter([CPU], is_first_on_node=False, before=ZEROS)
    assert (first.read(), second.read()) == ({"cpu_j": None, "gpu_j": 0.0}, ZEROS)
    assert EnergyMeter([torch.device("cuda", 0)], is_first_on_node=False, before=ZEROS).read()["gpu_j"] is None


@pytest.mark.parametrize("fault", ["gone", "empty"])
def test_a_counter_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = EnergyMeter([CPU], is_first_on_node=True, before=ZEROS)
    put(package, 5_000_000)
    assert meter.read()["cpu_j"] == 5.0
    if fault == "gone":
        package.unlink()
    else:
        package.write_text("")
    assert cpu_counters(tmp_path) == [] and meter.read()["cpu_j"] is None
    # What it drew in between is not known: back again, it tells nothing.
    put(package, 6_000_000)
    assert meter.read()["cpu_j"] is None


def test_a_new_run_has_drawn_nothing(tmp_path: Path) -> None:
    assert spent_before(tmp_path / "metrics.jsonl") == ZEROS
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "loss": 1.0}) + "\n")
    assert spent_before(tmp_path / "metrics.jsonl") == ZEROS
