"""The experiments that come with the project: each plans, and those that were not run rehearse on the sample data."""

import csv
import shlex
from pathlib import Path

import pytest

from sret_scale import cli
from sret_scale.config.run_config import from_yaml
from sret_scale.lab.experiments.declared import load_experiment
from sret_scale.lab.experiments.forecast import fit_speed
from sret_scale.lab.readable_numbers import compact, grouped
from sret_scale.launch.preflight import check_run
from tests.tiny import ROOT, tiny_shards

FOLDER = ROOT / "experiments"
NOT_RUN = ("imagenet_depth.yaml", "imagenet_reproduce.yaml")
DEPTHS = {
    "fashion_depth": [10, 20, 50, 108, 250, 512],
    "fashion_flops": [10, 20, 50, 108, 250],
    "fashion_branch": [50, 108, 512],
    "fashion_projections": [108],
    "fashion_taught": [10, 20, 50, 108],
    "fashion_gpu": [20, 108, 300, 1000],
    "rate_transfer": [20, 50, 108],
    "natural_images": [20, 108],
    "maze_path": [80],
    "maze_depth": [120],
}


def _rehearsal(file: Path) -> list[str]:
    """The arguments of the trial on small data that the file's head tells: options, then overrides."""
    text = "".join(line[1:] for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = next(part for part in text.replace("\\\n", " ").splitlines() if "--rehearse" in part)
    words = shlex.split(command)
    assert words[:3] == ["sret-scale", "sweep", f"experiments/{file.name}"]
    return words[3:]


@pytest.mark.lengthy
@pytest.mark.parametrize("name", sorted(DEPTHS))
def test_the_experiments_have_the_depths_that_they_tell(name: str) -> None:
    _, planned = load_experiment(FOLDER / f"{name}.yaml")
    assert sorted({run.applications for run in planned}) == DEPTHS[name]
    if name == "fashion_flops":
        base = from_yaml(FOLDER / "fashion_base.yaml")
        flops = {run.applications: run.macs * run.config.train.total_images for run in planned}
        assert flops[108] == next(run.macs for run in planned if run.applications == 108) * base.train.total_images
        assert max(flops.values()) / min(flops.values()) < 1.001


@pytest.mark.lengthy
@pytest.mark.parametrize("name", (*NOT_RUN, "natural_images.yaml"))
def test_an_experiment_says_that_it_was_not_run_and_its_trial_fits_small_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FOLDER / name
    assert file.read_text().startswith("# NOT RUN.")
    option, ratio, *changes = _rehearsal(file)
    assert option == "--rehearse"
    _, planned = load_experiment(file, changes=changes, rehearsal=float(ratio))
    monkeypatch.chdir(tiny_shards(tmp_path / "shards").parent)
    for run in planned:
        assert run.config.train.total_images == 128 and run.config.optim.warmup_images == 13
        if not run.config.distill.teacher:
            check_run(run.config, 1)


@pytest.mark.lengthy
def test_the_depths_and_controls_of_imagenet_are_those_that_the_file_tells() -> None:
    _, planned = load_experiment(FOLDER / "imagenet_depth.yaml")
    runs = {run.name: run for run in planned}
    depths = {name: run.applications for name, run in runs.items()}
    wide = {"wide_as_108": 20, "wide_as_300": 20}
    assert depths == {"t_20": 20, "t_108": 108, "t_300": 300, "t_1000": 1000, "untied_108": 108, **wide}
    assert {run.config.train.total_images for run in planned} == {100 * 1_281_167}
    for depth in (108, 300):
        assert runs[f"wide_as_{depth}"].macs == pytest.approx(runs[f"t_{depth}"].macs, rel=0.1)
    assert runs["untied_108"].parameters > 3 * runs["t_108"].parameters


@pytest.mark.lengthy
def test_the_hours_in_the_documentation_are_those_of_the_measured_speeds() -> None:
    with (FOLDER / "imagenet_speeds.csv").open(newline="") as file:
        speed = fit_speed([(float(row["macs"]), 1 / float(row["images_per_s"])) for row in csv.DictReader(file)])
    documented = {}
    for line in (ROOT / "docs" / "lab.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[-1].replace(",", "").isdecimal():
            documented[cells[0].removeprefix("reproduce: ").partition(",")[0]] = cells
    planned = [run for name in NOT_RUN for run in load_experiment(FOLDER / name)[1]]
    assert [run.name for run in planned] == list(documented)
    for run in planned:
        _, applications, parameters, macs, images, hours = documented[run.name]
        assert int(applications.replace(",", "")) == run.applications and compact(run.parameters) == parameters
        assert (compact(run.macs), grouped(run.config.train.total_images)) == (macs, images)
        assert int(hours.replace(",", "")) == round(speed.run_s(run) / 3600)


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.multi_process
def test_a_trial_of_the_imagenet_experiment_trains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_shards(tmp_path / "shards").parent)
    file = FOLDER / "imagenet_depth.yaml"
    # The task of a job array is one run: here the shallowest, 20 applications.
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    arguments = [*_rehearsal(file), "--folder", "runs", "--ranks", "1", "--array-task"]
    assert cli.main(["sweep", str(file), *arguments]) == 0
    assert cli.main(["report", "runs"]) == 0
    assert '"state": "finished"' in Path("runs/t_20/status.json").read_text()
