"""Experiments: which runs a file declares, what matching holds equal, and how a sweep takes failures and stops."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from sret_scale import cli
from sret_scale.commands.sweep import _array_task
from sret_scale.config.run_config import from_yaml, override, to_yaml
from sret_scale.lab.experiments.declared import Experiment, load_experiment, plan_runs
from sret_scale.lab.experiments.forecast import fit_speed, measure_speeds, sweep_table
from sret_scale.lab.experiments.matching import memory_of
from sret_scale.lab.experiments.metrics_tail import Standing
from sret_scale.lab.experiments.pool import RunState, run_sweep
from sret_scale.lab.experiments.run_slots import Slot, device_slots, host_slots, local_slots
from sret_scale.lab.experiments.sweep_view import SweepView, live_table
from sret_scale.launch.hostfile import read_hostfile
from sret_scale.memory import prepare_memory
from sret_scale.memory.planning.probe import probe_step
from sret_scale.memory.planning.rank_state import state_bytes
from sret_scale.model import describe
from tests.tiny import ROOT, tiny_config, tiny_shards, write_config

LOOPS = "model.stages.0.num_loops + model.stages.1.num_loops"


@pytest.fixture
def base(tmp_path: Path) -> str:
    file = tmp_path / "base.yaml"
    file.write_text(to_yaml(tiny_config(tmp_path)))
    return str(file)


def _file(folder: Path, **tree: Any) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def test_a_grid_is_every_combination_in_order(tmp_path: Path, base: str) -> None:
    grid = {LOOPS: [2, [3, 5]], "train.seed": [0, 1]}
    _, planned = load_experiment(_file(tmp_path, base=base, grid=grid, set={"optim.weight_decay": 0.1}))
    assert [run.name for run in planned] == [
        "num_loops-2_seed-0",
        "num_loops-2_seed-1",
        "num_loops-3_num_loops-5_seed-0",
        "num_loops-3_num_loops-5_seed-1",
    ]
    assert [run.applications for run in planned] == [4, 4, 8, 8]
    assert [run.config.train.seed for run in planned] == [0, 1, 0, 1]
    assert {run.config.optim.weight_decay for run in planned} == {0.1}


def test_a_list_of_runs_may_change_the_whole_model(base: str) -> None:
    runs: list[dict[str, Any]] = [{"train.seed": 3}, {"train.seed": 3, "model": "demo_control_20"}]
    planned = plan_runs(Experiment(base=base, runs=runs))
    assert [run.applications for run in planned] == [5, 20] and planned[1].config.train.seed == 3


def test_a_run_may_have_a_name_and_a_base_and_changes_reach_every_run(tmp_path: Path, base: str) -> None:
    runs = [{"name": "shallow"}, {"name": "other", "base": "demo_control_20", "train.seed": 3}]
    file = _file(tmp_path, base=Path(base).name, runs=runs)
    changes = ["model.drop_path=0.3", "train.total_images=6400", "optim.warmup_images=640"]
    _, planned = load_experiment(file, changes=changes, rehearsal=0.1)
    assert [(run.name, run.applications) for run in planned] == [("shallow", 5), ("other", 20)]
    assert {run.config.model.drop_path for run in planned} == {0.3}
    assert {(run.config.train.total_images, run.config.optim.warmup_images) for run in planned} == {(640, 64)}
    for ratio, message in ((0.0, "--rehearse: expected a ratio"), (0.001, "run shallow: 6 images are left")):
        with pytest.raises(ValueError, match=message):
            load_experiment(file, changes=changes, rehearsal=ratio)
    with pytest.raises(ValueError, match="base: there is no"):
        load_experiment(_file(tmp_path, base="absent.yaml", runs=runs))


def test_equal_flops_trade_images_for_depth(base: str) -> None:
    planned = plan_runs(Experiment(base=base, grid={LOOPS: [3, 6, 12]}, match="equal_flops"))
    config = tiny_config(Path("x"))
    budget = describe(config.model)["macs"] * config.train.total_images
    assert len({run.macs for run in planned}) == 3
    for run in planned:
        assert abs(run.macs * run.config.train.total_images - budget) <= run.macs
        ratio = run.config.train.total_images / config.train.total_images
        assert run.config.optim.warmup_images == round(64 * ratio)
        assert run.config.train.checkpoint_interval_images == round(96 * ratio)


def test_equal_parameters_trades_width_for_depth(base: str) -> None:
    runs = plan_runs(Experiment(base=base, grid={LOOPS: [1, 4, 9]}, match="equal_parameters"))
    wanted = describe(tiny_config(Path("x")).model)["parameters"]
    assert all(abs(run.parameters - wanted) <= 0.01 * wanted for run in runs)
    assert [run.applications for run in runs] == [2, 8, 18]
    widths = [run.config.model.stages[0].width for run in runs]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert all(run.config.model.stages[1].width == 2 * width for run, width in zip(runs, widths, strict=True))


@pytest.mark.lengthy
def test_equal_memory_lets_the_planner_choose_batch_and_schedule(base: str) -> None:
    experiment = Experiment(base=base, grid={LOOPS: [2, 12]}, fixed={"memory.schedule": "none"}, match="equal_memory")
    shallow, deep = (run.config for run in plan_runs(experiment))
    assert shallow.memory == deep.memory and shallow.memory.schedule == "planned"
    assert shallow.train.global_batch_size == deep.train.global_batch_size
    assert deep.train.global_batch_size % deep.train.micro_batch_size == 0
    plain = override(from_yaml(Path(base)), ["memory.schedule=none"])
    assert shallow.memory.budget_bytes == memory_of(plain, 1)
    model = deep.model.build()
    prepared = prepare_memory(
        model,
        deep.memory,
        micro_batch_size=deep.train.micro_batch_size,
        precision="fp32",
        world_size=1,
        zero_stage=1,
    )
    assert prepared.activations < memory_of(plain, 1)


@pytest.mark.lengthy
@pytest.mark.parametrize("schedule", ["none", "nested"])
def test_the_memory_of_a_run_is_what_the_run_itself_predicts(base: str, schedule: str) -> None:
    """What the stem stores depends on the schedule, in both."""
    config = override(from_yaml(Path(base)), [f"memory.schedule={schedule}"])
    micro = config.train.micro_batch_size
    state: dict[str, Any] = {"micro_batch_size": micro, "precision": "fp32", "world_size": 1, "zero_stage": 1}
    prepared = prepare_memory(config.model.build(), config.memory, **state)
    costs = probe_step(config.model, micro_batch_size=micro)
    assert memory_of(config, 1) == state_bytes(costs, world_size=1, zero_stage=1).total + prepared.activations


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"grid": {LOOPS: [90]}, "match": "equal_parameters"},
            r"run num_loops-90: equal_parameters: the nearest model has [\d,]+ parameters at widths .* the base has",
        ),
        ({"grid": {"model.stages.0.mlp_ratio": [1.0]}, "match": "equal_parameters"}, "chooses .*mlp_ratio itself"),
        ({"grid": {"train.micro_batch_size": [4]}, "match": "equal_memory"}, "chooses train.micro_batch_size itself"),
        (
            {
                "grid": {LOOPS: [3]},
                "set": {"memory.schedule": "planned", "memory.budget_bytes": 1000},
                "match": "equal_memory",
            },
            "run num_loops-3: equal_memory: the base needs 1000 B on a rank; memory: micro-batch 1 needs at least",
        ),
        ({"grid": {}}, "either `grid`"),
        ({"grid": {"train.seed": []}}, "grid.train.seed is empty"),
        ({"grid": {"train.sed": [1]}}, "run sed-1: unknown key 'train.sed': did you mean 'train.seed'"),
        ({"grid": {"train.seed": ["one"]}}, "train.seed"),
        ({"grid": {"train.seed": [1, 1]}}, "two runs would be called 'seed-1'"),
        ({"grid": {LOOPS: [[1, 2, 3]]}}, "expected one value for all or 2 values"),
        (
            {"grid": {LOOPS: [90]}, "match": "equal_flops"},
            "run num_loops-90: equal_flops: .* one global batch of 32",
        ),
        ({"grid": {"train.seed": [1]}, "match": "equal_luck"}, "match"),
        ({"grid": {"train.seed": [1]}, "retry": 2}, "unknown key 'retry': did you mean 'retries'"),
        ({"grid": {"train.seed": [1]}, "retries": -1}, "expected 0 or more"),
    ],
)
def test_a_bad_experiment_is_refused_with_its_reason(
    tmp_path: Path, base: str, tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(_file(tmp_path, base=base, **tree))


# Stands in for `train`: takes the run's next exit status from a file beside the experiment, and leaves a status file.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
plan, folder = Path(sys.argv[1]), Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(Path(sys.argv[3]).read_text())
with (plan.parent / "started").open("a") as stream:
    stream.write(folder.name + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\\n")
statuses = json.loads(plan.read_text()).get(folder.name, [0])
attempts = sum(line.split()[0] == folder.name for line in (plan.parent / "started").read_text().splitlines())
status = statuses[min(attempts, len(statuses)) - 1]
if status == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    line = {"kind": "train", "step": 1, "images": 64, "time_s": 2.0, "loss": 1.5, "images_per_s": 32}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    time.sleep(60)
if status == 2:
    print("error: no shards")
(folder / "status.json").write_text(json.dumps({"state": {0: "finished", 85: "stopped"}.get(status, "failed")}))
sys.exit(status)
"""


class _Said:
    """A view that keeps what it was told, and may act on a state that it sees."""

    def __init__(self, on_show: Callable[[Sequence[RunState]], None] = lambda states: None) -> None:
        self.lines: list[str] = []
        self.states: list[RunState] = []
        self.on_show = on_show

    def say(self, text: str) -> None:
        self.lines.append(text)

    def show(self, states: Sequence[RunState]) -> None:
        self.states = list(states)
        self.on_show(states)


def _sweep(
    base: str, folder: Path, seeds: list[int], view: _Said, *, slots: Sequence[Slot] = (Slot(name="here"),), **plan: Any
) -> tuple[int, list[str]]:
    """Status of the sweep, and the names of the runs it started, in order. `plan`: statuses of seed0, seed1, ..."""
    folder.mkdir(exist_ok=True)
    (folder.parent / "started").unlink(missing_ok=True)
    (folder.parent / "plan.json").write_text(json.dumps({f"seed-{key[4:]}": value for key, value in plan.items()}))

    def command(config: Path, run: Path, slot: Slot) -> list[str]:
        return [sys.executable, "-S", "-c", CHILD, str(folder.parent / "plan.json"), str(run), str(config)]

    planned = plan_runs(Experiment(base=base, grid={"train.seed": seeds}))
    status = run_sweep(planned, folder, slots, retries=1, view=view, command=command)
    started = folder.parent / "started"
    return status, [line.split()[0] for line in started.read_text().splitlines()] if started.exists() else []


@pytest.mark.multi_process
def test_a_failure_is_retried_then_reported_and_stops_nothing(tmp_path: Path, base: str) -> None:
    view = _Said()
    status, started = _sweep(base, tmp_path / "runs", [0, 9, 1, 2], view, seed0=[1], seed1=[1, 0], seed9=[2])
    assert status == 1
    assert started == ["seed-0", "seed-0", "seed-9", "seed-1", "seed-1", "seed-2"]
    assert any(line.startswith("failed: seed-0: exit status 1 after 2 attempts") for line in view.lines)
    assert "failed: seed-9: no shards" in view.lines and view.lines[-1].startswith("2 of 4 runs finished")


@pytest.mark.multi_process
def test_the_same_command_continues_after_a_stop_and_skips_what_is_finished(tmp_path: Path, base: str) -> None:
    first, second = _Said(), _Said()
    assert _sweep(base, tmp_path / "runs", [0, 1], first, seed1=[85]) == (85, ["seed-0", "seed-1"])
    assert _sweep(base, tmp_path / "runs", [0, 1, 2], second) == (0, ["seed-1", "seed-2"])
    assert second.lines[0] == "1 of 3 runs finished before"


@pytest.mark.multi_process
def test_a_signal_reaches_every_run_once_and_starts_no_more(tmp_path: Path, base: str) -> None:
    def stop(states: Sequence[RunState]) -> None:
        if sum(state.standing.images > 0 for state in states) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            view.on_show = lambda states: None

    view = _Said(stop)
    slots = [Slot(name="a"), Slot(name="b")]
    plan = {f"seed{seed}": ["sleep"] for seed in range(3)}
    status, started = _sweep(base, tmp_path / "runs", [0, 1, 2], view, slots=slots, **plan)
    assert status == 85 and sorted(started) == ["seed-0", "seed-1"]
    assert [state.state for state in view.states] == ["stopped", "stopped", "waiting"]
    assert (view.states[0].standing.loss, view.states[0].standing.remaining_s(128)) == (1.5, 2.0)


@pytest.mark.multi_process
def test_runs_side_by_side_have_slots_of_their_own(tmp_path: Path, base: str) -> None:
    slots = [Slot(name=f"GPU {index}", environment={"CUDA_VISIBLE_DEVICES": str(index)}) for index in (4, 7)]
    seen: set[int] = set()
    view = _Said(lambda states: seen.add(sum(state.state == "running" for state in states)))
    status, started = _sweep(base, tmp_path / "runs", [0, 1, 2], view, slots=slots, seed1=[1])
    assert status == 1 and sorted(set(started)) == ["seed-0", "seed-1", "seed-2"]
    assert {line.split()[1] for line in (tmp_path / "started").read_text().splitlines()} <= {"4", "7"}
    assert {state.state for state in view.states} == {"finished", "failed"}


@pytest.mark.multi_process
def test_a_finished_run_of_another_configuration_is_reported(tmp_path: Path, base: str) -> None:
    view = _Said()
    assert _sweep(base, tmp_path / "runs", [0], view) == (0, ["seed-0"])
    other = plan_runs(Experiment(base=base, grid={"train.seed": [0]}, fixed={"optim.weight_decay": 0.3}))
    assert run_sweep(other, tmp_path / "runs", [Slot(name="here")], retries=0, view=view) == 1
    assert any("another configuration: optim.weight_decay: 0.05 -> 0.3" in line for line in view.lines)
    (tmp_path / "runs" / "seed-0" / "config.yaml").write_text("model: {depth: 3}")
    assert run_sweep(other, tmp_path / "runs", [Slot(name="here")], retries=0, view=view) == 1
    assert any("cannot be read" in line and "remove it" in line for line in view.lines)


@pytest.mark.multi_process
def test_a_kill_of_the_sweep_ends_its_runs(tmp_path: Path, base: str) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
import sys
from pathlib import Path
from sret_scale.lab.experiments.declared import Experiment, plan_runs
from sret_scale.lab.experiments.run_slots import Slot
from sret_scale.lab.experiments.pool import run_sweep
class View:
    def say(self, text): pass
    def show(self, states): pass
child = "import os, time, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
run_sweep(plan_runs(Experiment(base={base!r}, grid={{"train.seed": [0]}})), Path({str(tmp_path / "runs")!r}),
          [Slot(name="here")], retries=0, view=View(), command=lambda *_: [sys.executable, "-S", "-c", child])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline_s = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    process.kill()
    process.wait()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "the run outlived its sweep"
        time.sleep(0.05)


def test_slots_share_out_gpus_and_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sret_scale.lab.experiments.run_slots.visible_gpus", lambda: ("0", "3", "5", "7"))
    assert local_slots(1, None) == [Slot(name="here")]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in local_slots(2, 2)] == ["0,3", "5,7"]
    with pytest.raises(ValueError, match=r"expected at most 4 ranks at once.*use --jobs 2"):
        local_slots(3, 2)
    with pytest.raises(ValueError, match="--jobs: expected at least 1"):
        local_slots(0, None)
    monkeypatch.setattr("sret_scale.lab.experiments.run_slots.visible_gpus", lambda: ())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot.arguments for slot in local_slots(3, None)] == [("--ranks", "1")] * 3
    assert all("OMP_NUM_THREADS" in slot.environment for slot in local_slots(3, None))


def test_host_slots_are_one_host_each(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("node-1 slots=8\nnode-2 slots=4\nnode-3 slots=8\n")
    hosts = read_hostfile(file)
    assert host_slots(hosts, 1, file, tmp_path)[0].arguments == ("--hostfile", str(file))
    slots = host_slots(hosts, 2, file, tmp_path / "own")
    assert [slot.name for slot in slots] == ["node-1", "node-2"]
    assert [read_hostfile(Path(slot.arguments[1])) for slot in slots] == [hosts[:1], hosts[1:2]]
    with pytest.raises(ValueError, match="at most one for each of the 3 hosts"):
        host_slots(hosts, 4, file, tmp_path)


def test_packed_runs_have_one_device_of_one_host_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "hosts").write_text("node-1 slots=2\nnode-2 devices=3\n")
    slots = device_slots(read_hostfile(tmp_path / "hosts"), tmp_path / "own")
    places = [read_hostfile(Path(slot.arguments[1])) for slot in slots]
    assert [(host.name, host.devices) for (host,) in places] == [
        ("node-1", ("0",)),
        ("node-1", ("1",)),
        ("node-2", ("3",)),
    ]
    assert ["OMP_NUM_THREADS" in slot.environment for slot in slots] == [True, True, False]


def test_packing_needs_a_hostfile_and_no_jobs(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    for extra in ([], ["--hostfile", str(tmp_path / "hosts"), "--jobs", "2"]):
        assert cli.main(["sweep", base, "--per-gpu", *extra]) == 2
        assert "--per-gpu starts one run on every GPU of a --hostfile" in capsys.readouterr().err


@pytest.mark.lengthy
def test_the_table_says_what_each_run_costs(base: str) -> None:
    planned = plan_runs(Experiment(base=base, grid={LOOPS: [1, 2]}))
    speed = fit_speed([(run.macs, 0.001 + 1e-9 * run.macs) for run in planned])
    assert speed.fixed_s == pytest.approx(0.001) and speed.per_mac_s == pytest.approx(1e-9)
    lines = sweep_table(planned, speeds=[speed], price_per_hour=3600.0).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["run", "applications"] and "iB" in lines[1]
    seconds = [run.config.train.total_images * (0.001 + 1e-9 * run.macs) for run in planned]
    assert lines[1].endswith(f"{seconds[0]:.2f}") and lines[3].endswith(f"{sum(seconds):.2f}")


@pytest.mark.lengthy
def test_a_measured_speed_grows_with_the_macs(base: str) -> None:
    speeds = measure_speeds(plan_runs(Experiment(base=base, grid={LOOPS: [1, 8]})))
    assert len(speeds) == 2 and all(speed.fixed_s >= 0 and speed.per_mac_s > 0 for speed in speeds)


@pytest.mark.lengthy
def test_what_is_measured_is_a_range_with_a_warning_on_a_busy_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_config(tmp_path / "base.yaml", tiny_config(tiny_shards(tmp_path / "shards")))
    file = _file(tmp_path, base=str(base), grid={LOOPS: [1, 2]})
    ticks = iter([0, 9, 9, 19, 20, 40, 50, 60, 70, 80, 90, 100] * 2)
    monkeypatch.setattr("sret_scale.lab.experiments.forecast.time.perf_counter", lambda: next(ticks) / 4)
    monkeypatch.setattr("sret_scale.lab.experiments.forecast.psutil.cpu_percent", lambda interval: 73.2)
    assert cli.main(["sweep", str(file), "--dry-run", "--measure", "--price-per-hour", "3600"]) == 0
    shown = capsys.readouterr()
    # 512 images of 2.5 to 5 s for 8 of them; the first pass, which warms up, would have been faster.
    assert shown.out.splitlines()[1].endswith(" 2 min 40 s to 5 min 20 s  160.00 to 320.00")
    assert shown.err == "warning: other processes use 73 % of this machine's cores: measured times are too long\n"


def test_the_job_array_has_a_task_for_every_run(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _file(tmp_path, base=base, grid={"train.seed": [4, 5, 6]})
    slurm = ["slurm", "--nodes", "1", "--cpus", "8", "--gpus", "1", "--time", "01:00:00", "--partition", "long"]
    assert cli.main([*slurm, "--array", "2", "--", "sweep", str(file)]) == 0
    text = capsys.readouterr().out
    assert "\n#SBATCH --array=0-2%2\n" in text and "--partition=long" in text
    assert text.rstrip().endswith(f"sweep {file} --array-task")
    assert "--requeue" in text and "#SBATCH --gpus-per-node=1" in text
    for bad in (["0", "--", "sweep", str(file)], ["2", "--", "describe", "sret_t"]):
        assert cli.main([*slurm, "--array", *bad]) == 2, bad
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert cli.main(["sweep", str(file), "--array-task"]) == 2
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert cli.main(["sweep", str(file), "--array-task"]) == 2
    assert "task 3 of an experiment of 3 runs" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert _array_task(3) == 2


@pytest.mark.lengthy
def test_the_live_table_shows_what_runs_first_and_never_more_than_a_screen(base: str) -> None:
    planned = plan_runs(Experiment(base=base, grid={"train.seed": list(range(40))}))
    states = [RunState(run=run, folder=Path(run.name)) for run in planned]
    states[30].state, states[30].slot = "running", "GPU 3"
    states[30].standing = Standing(images=128, loss=1.234, images_per_s=64.0)
    console = Console(record=True, width=120, file=io.StringIO())
    with SweepView(is_live=True, console=console) as view:
        view.say("hello")
        view.show(states)
    text = console.export_text()
    assert "hello" in text and "1 running, 39 waiting" in text and "... and 16 more" in text
    row = next(line for line in text.splitlines() if "seed-30" in line)
    for part in ("running (GPU 3)", "128 of 512", "64 samples/s", "loss 1.234", "6 s left"):
        assert part in row


def test_names_reach_no_terminal_as_they_are(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = plan_runs(Experiment(base=base, grid={"train.seed": [0]}))
    state = RunState(run=replace(run, name="\x1b[31mred"), folder=Path("x"), state="running", slot="\x1b]0;owned\x07")
    state.standing = Standing(images=128)
    table = io.StringIO()
    Console(width=200, file=table).print(live_table([state]))
    with SweepView(is_live=False) as view:
        view.say("\x1b[2J")
        view.show([state])
    for text in (capsys.readouterr().out, table.getvalue()):
        assert "\\x1b" in text and not any(c in text for c in "\x1b\x07"), ascii(text)


def test_without_a_terminal_running_runs_are_lines(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan_runs(Experiment(base=base, grid={"train.seed": [0, 1]}))
    states = [RunState(run=run, folder=Path(run.name), state="running", slot="here") for run in planned]
    states[0].standing = Standing(images=128, loss=1.0, images_per_s=64.0)
    with SweepView(is_live=False) as view:
        view.show(states)
        view.show(states)
    assert capsys.readouterr().out.splitlines() == ["seed-0:  128 of 512  64 samples/s  loss 1.000    6 s left"]


@pytest.mark.slow
def test_a_thousand_runs_are_planned_and_written_as_one_table(base: str) -> None:
    planned = plan_runs(Experiment(base=base, grid={"train.seed": list(range(500)), LOOPS: [1, 2]}))
    assert len(sweep_table(planned).splitlines()) == 1002


@pytest.mark.lengthy
def test_a_dry_run_starts_nothing_and_refuses_what_a_start_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_config(tmp_path / "base.yaml", tiny_config(tiny_shards(tmp_path / "shards")))
    file = _file(tmp_path, base=str(base), grid={"train.seed": [4, 5, 6, 7]})
    before, words = set(tmp_path.iterdir()), ["sweep", str(file), "--dry-run", "--folder", str(tmp_path / "runs")]
    assert cli.main(words) == 0
    assert "seed-4" in capsys.readouterr().out and set(tmp_path.iterdir()) == before
    shutil.move(tmp_path / "shards" / "test", tmp_path / "shards" / "elsewhere")
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert "seed-4" in shown.out
    assert "error: 4 of 4 runs would be refused: " in shown.err and "no such shard folder" in shown.err
    assert shown.err.count("\n") == 1 and "(seed-4, seed-5, seed-6 and 1 more)" in shown.err
    file.write_text(file.read_text().replace("train.seed", "optim.warmup_images").replace("- 7", "- 700"))
    shutil.move(tmp_path / "shards" / "elsewhere", tmp_path / "shards" / "test")
    assert cli.main(words) == 2
    assert "1 of 4 runs would be refused: optim.warmup_images=700 leaves nothing" in capsys.readouterr().err
    assert cli.main(["sweep", str(tmp_path / "absent.yaml")]) == 2


@pytest.mark.multi_process
def test_a_refusal_that_awaits_all_runs_stops_the_sweep_after_the_first(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shards of `base` do not exist."""
    file = _file(tmp_path, base=base, grid={"train.seed": list(range(12))})
    assert cli.main(["sweep", str(file), "--folder", str(tmp_path / "runs")]) == 2
    shown = capsys.readouterr().out
    assert shown.count("no such shard folder") == 1 and shown.count("attempt") == 1
    assert "stopped: the 11 runs that are left would be refused alike" in shown
    assert not (tmp_path / "runs" / "seed-0").exists()
