"""Nothing that data names is imported: a module named in every file of a run folder and of a store stays unread."""

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.labels.records import parse_header, record_dtype, render_file
from data_pipelines.labels.store import LabelPlan, read_plan, render_header
from sret_scale.cli import main
from sret_scale.config.run_config import RunConfig
from tests.data.shard_sources import encoded, pixels
from tests.hand_made import make_labels, make_run
from tests.tiny import ROOT, tiny_config, tiny_shards

CANARY = "canary_of_data"
TEACHER, TRANSFORM = f"module:{CANARY}:teacher", f"{CANARY}:transform"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tiny_shards(tmp_path_factory.mktemp("shards")))
    return replace(config, data=replace(config.data, view_seed=0, num_views=1))


@pytest.fixture
def is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether the canary's code has run; it can be imported."""
    folder, mark = tmp_path / "modules", tmp_path / "mark"
    folder.mkdir()
    (folder / f"{CANARY}.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from tests.hand_made import small_teacher as teacher\ndef transform(image_CHW, seed): return image_CHW\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.delitem(sys.modules, CANARY, raising=False)
    return mark.exists


def planted_run(path: Path, config: RunConfig) -> Path:
    """A run that names the canary wherever one of its files has a name or room for one."""
    named = replace(
        config, data=replace(config.data, transform=TRANSFORM), distill=replace(config.distill, teacher=TEACHER)
    )
    run = make_run(path, named)
    for file in (run / "status.json", run / "environment.json", run / "model.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "module": TEACHER, "reason": TEACHER, "command": f"train {TEACHER}"}))
    with (run / "metrics.jsonl").open("a") as stream:
        line = {"kind": "train", "step": 2, "images": 64, "time_s": 2.0, "loss": 1.0, "module": TEACHER}
        stream.write(json.dumps(line) + "\n")
    return run


def planted_labels(folder: Path, config: RunConfig, **changes: Any) -> Path:
    """A store, sealed again, whose plan has `changes`."""
    make_labels(folder, Path(config.data.train_folder), config)
    before = read_plan(folder)
    plan = LabelPlan(**{**asdict(before), **changes, "shards": before.shards})
    for unit in plan.units():
        file = folder / plan.file_name(unit)
        data = file.read_bytes()
        header, offset = parse_header(data, len(data))
        records_VN = np.frombuffer(data[offset:], record_dtype(plan.top_k)).reshape(1, -1)
        file.write_bytes(render_file({**header, "plan_sha256": plan.sha256}, records_VN))
    coverage = json.loads((folder / "header.json").read_text())["coverage"]
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "header.json").write_bytes(render_header(plan, coverage))
    return folder


@pytest.mark.lengthy
def test_no_command_imports_what_a_run_names(
    config: RunConfig, tmp_path: Path, is_imported: Callable[[], bool]
) -> None:
    run = planted_run(tmp_path / "run", config)
    out, picture = str(tmp_path / "out"), tmp_path / "picture.png"
    picture.write_bytes(encoded(pixels(0, 28, 28), "PNG"))
    commands: tuple[list[str | Path], ...] = (
        ["evaluate", run],
        ["evaluate", run, "--dry-run"],
        ["evaluate", run, "--early-exit", "confidence", "--thresholds", "0.5"],
        ["predict", run, picture],
        ["predict", run / "checkpoints" / "step-000000001", picture, "--json"],
        ["report", run, "-o", f"{out}.html"],
        ["analyze", "loops", run, "--images", "8"],
        ["export", run, f"{out}.pt2", "--format", "torch"],
        ["export", run, f"{out}.safetensors", "--format", "safetensors"],
        ["weights", "grow", run, f"{out}.grown.safetensors", "--loops", "4"],
        ["checkpoint", "info", run],
        ["checkpoint", "verify", run],
    )
    for command in commands:
        assert main(list(map(str, command))) == 0, command
        assert not is_imported(), command


def test_labels_write_imports_no_transform_of_a_file_unless_it_is_repeated(
    config: RunConfig, tmp_path: Path, is_imported: Callable[[], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = planted_run(tmp_path / "run", config)
    numbers = ["--teacher", "module:tests.hand_made:small_teacher", "--views", "1", "--top-k", "3"]
    command = ["labels", "write", config.data.train_folder, str(tmp_path / "store"), *numbers]
    command += ["--recipe", str(run / "config.yaml")]
    assert main(command) == 2
    assert f"--set data.transform={TRANSFORM}" in capsys.readouterr().err and not is_imported()
    assert main([*command, "--set", f"data.transform={TRANSFORM}"]) == 0
    assert is_imported()


def test_labels_verify_imports_nothing_of_a_store_unless_it_is_repeated(
    config: RunConfig, tmp_path: Path, is_imported: Callable[[], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_plan(make_labels(tmp_path / "before", Path(config.data.train_folder), config))
    folder = planted_labels(
        tmp_path / "store",
        config,
        teacher={**before.teacher, "spec": TEACHER},
        view={**before.view, "transform": TRANSFORM},
    )
    assert main(["labels", "info", str(folder)]) == 0
    verify = ["labels", "verify", str(folder), config.data.train_folder]
    assert main(verify) == 2
    assert f"--teacher {TEACHER}" in capsys.readouterr().err and not is_imported()
    known = ["--teacher", "module:tests.hand_made:small_teacher"]
    assert main([*verify, *known]) == 2
    assert f"--transform {TRANSFORM}" in capsys.readouterr().err and not is_imported()
    assert main([*verify, *known, "--transform", "tests.data.stream_transforms:seeded_noise"]) == 2
    assert f"--transform {TRANSFORM}" in capsys.readouterr().err and not is_imported()
    assert main([*verify, "--teacher", TEACHER, "--transform", TRANSFORM]) == 0
    assert is_imported()


def test_a_joined_teacher_of_a_store_is_not_imported_either(
    config: RunConfig, tmp_path: Path, is_imported: Callable[[], bool]
) -> None:
    before = read_plan(make_labels(tmp_path / "before", Path(config.data.train_folder), config))
    members = [{**before.teacher, "spec": "run:nowhere+" + TEACHER}, {**before.teacher, "spec": TEACHER}]
    folder = planted_labels(tmp_path / "store", config, teacher={"members": members})
    assert main(["labels", "verify", str(folder), config.data.train_folder]) == 2
    assert not is_imported()


@pytest.mark.lengthy
def test_modules_are_imported_by_names_that_are_no_constants_in_known_places_only() -> None:
    """A new way to import what a text names belongs to this list, and into the tests above."""
    importers = {"import_module", "import_of_user", "function_of_user", "__import__"}
    importers |= {"resolve_name", "run_module", "run_path", "exec", "eval"}
    found = set()
    for file in (*(ROOT / "sret_scale").rglob("*.py"), *(ROOT / "data_pipelines").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and node.args]
        for call in calls:
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in importers and not isinstance(call.args[0], ast.Constant):
                found.add(str(file.relative_to(ROOT)))
    assert {"sret_scale/distill/networks.py", "data_pipelines/user_functions.py"} <= found
    assert found <= {
        # Commands, actions and names for Python, by tables in the code; fixed packages; what a launcher starts.
        "sret_scale/__init__.py",
        "sret_scale/commands/arguments.py",
        "sret_scale/launch/rank_bootstrap.py",
        "sret_scale/launch/requests.py",
        "data_pipelines/remote/fetch.py",
        # A teacher, a transform and a tracker of the user's.
        "data_pipelines/user_functions.py",
        "sret_scale/distill/networks.py",
        "data_pipelines/stream/samples.py",
        "sret_scale/train/telemetry/trackers.py",
    }
