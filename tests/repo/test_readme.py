"""The README's own commands, run as they stand there; training gets a tiny model, batch and number of images."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sret_scale.lab.demo as demo
from sret_scale import cli
from sret_scale.config.recipes import Recipe, recipe
from sret_scale.config.run_config import RunConfig, differences, from_yaml, grad_accum_steps
from sret_scale.launch.preflight import start_run
from tests.forked import use_forks
from tests.tiny import ROOT, tiny_idx

pytestmark = pytest.mark.multi_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "model=demo_control_20",
    "model.num_classes=2",
    "engine.ds_config=zero1",
    "data.crop=padded",
    "data.workers=1",
    "train.total_images=32",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "optim.warmup_images=0",
]


def commands() -> list[list[str]]:
    """The words of every indented `./launch.sh` command of the README, continued lines joined and comments dropped."""
    text = README.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"^    \./launch\.sh(.*)$", text, re.MULTILINE)]


def test_the_readme_starts_with_the_demos_and_the_tests() -> None:
    assert commands()[:4] == [[], ["test"], ["demo", "reach"], ["demo", "text"]]
    assert len(commands()) >= 9


def test_the_commands_of_a_run_work_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "imagenet" / split / label
            folder.mkdir(parents=True)
            for index in range(10):
                Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    (tmp_path / "photos").symlink_to(tmp_path / "imagenet" / "train")
    # In this process: each start of Python would import torch again. The ranks are processes all the same, and those of
    # the second run forks.
    for words in commands()[4:]:
        is_shallow = words[0] == "train" and "runs/shallow" in words
        with pytest.MonkeyPatch.context() as patch:
            if is_shallow:
                use_forks(patch)
            tiny = [*TINY, *(["--ranks", "1"] if is_shallow else [])] if words[0] == "train" else []
            assert cli.main([*words, *tiny]) == 0, f"{words}: {capsys.readouterr()}"
    assert json.loads((tmp_path / "runs/deep/status.json").read_text())["state"] == "finished"
    page = (tmp_path / "report.html").read_text()
    assert "deep" in page and "shallow" in page


def test_the_python_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"From Python:\n\n((?:    .*\n|\n)+)", README)
    assert block
    names: dict[str, object] = {}
    exec(re.sub(r"^    ", "", block.group(1), flags=re.MULTILINE), names)
    assert tuple(names["logits"].shape) == (1, 1000)  # type: ignore[attr-defined]
    assert capsys.readouterr().out.split()[0] == "14178796"


def test_ten_lines_make_a_recursion_of_anyones_block(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(part for part in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Recursion" in part)
    assert len(code.splitlines()) <= 10
    names: dict[str, object] = {}
    for many, few in (("300", "6"), ("250", "5"), ("200", "4")):
        code = code.replace(many, few)
    exec(code, names)
    assert "'applications': 6" in capsys.readouterr().out


def test_the_demo_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def tiny(name: str) -> Recipe:
        config = recipe(name).config
        train = replace(
            config.train, total_images=96, global_batch_size=32, micro_batch_size=16, eval_interval_images=64
        )
        optim = replace(config.optim, warmup_images=32)
        return replace(recipe(name), config=replace(config, train=train, optim=optim))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(config: RunConfig, path: Path) -> int:
        # The whole way of the student, whose ranks are looked at; the others have forked ones.
        with pytest.MonkeyPatch.context() as patch:
            if path.name != "student":
                use_forks(patch)
            return start_run(config, path, num_ranks=2 if path.name == "student" else 1)

    monkeypatch.setattr(demo, "recipe", tiny)
    monkeypatch.setattr(demo, "start_run", start)
    output = tmp_path / "demo"
    source = tiny_idx(tmp_path / "idx")
    assert demo.run_demo(output, source) == 0
    lines = capfd.readouterr().out.splitlines()[-4:]
    assert "Logistic regression" in lines[0] and "no evidence about ImageNet" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["teacher", "student", "control"]
    assert " 10 applications" in lines[1] and " 108 applications" in lines[2] and " 20 applications" in lines[3]
    configs = {role: from_yaml(output / role / "config.yaml") for role in demo.ROLES}
    student, control = configs["student"], configs["control"]
    assert student.engine.ds_config.startswith("zero1") and student.memory.schedule == "planned"
    assert student.distill.teacher == control.distill.teacher == f"run:{output / 'teacher'}"
    assert json.loads((output / "student" / "environment.json").read_text())["world_size"] >= 2
    different = [line.partition(":")[0] for line in differences(student, control)]
    assert different == [
        *(f"model.stages.{stage}.num_loops" for stage in range(3)),
        "memory.schedule",
        "memory.budget_bytes",
    ]
    page = (output / "report.html").read_text()
    assert (
        "smoke test" in page
        and all(role in page for role in demo.ROLES)
        and "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    )
    assert len(list((output / "report_files").glob("*.png"))) >= 3
    # The second start skips everything that is there.
    before = {role: (output / role / "metrics.jsonl").read_bytes() for role in demo.ROLES}
    monkeypatch.setattr(demo, "write_report", lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "_baseline", lambda sets: 0.0)
    assert demo.run_demo(output, source) == 0
    assert before == {role: (output / role / "metrics.jsonl").read_bytes() for role in demo.ROLES}


@pytest.mark.parametrize("world_size", range(1, 17))
def test_the_demo_starts_on_any_number_of_gpus(world_size: int, tmp_path: Path) -> None:
    for role, name in demo.ROLES.items():
        train = demo.demo_config(name, tmp_path, world_size=world_size, has_teacher=role != "teacher").train
        assert grad_accum_steps(train, world_size) >= 1
        assert abs(train.global_batch_size - 64) <= world_size / 2


def test_a_student_that_learned_too_little_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_shards", lambda output, source, split, started: None)
    monkeypatch.setattr(demo, "start_run", lambda config, path: 0)
    monkeypatch.setattr(demo, "_baseline", lambda sets: 0.84)
    monkeypatch.setattr(demo, "load_run", lambda path: SimpleNamespace(model={"applications": 1, "parameters": 1}))
    monkeypatch.setattr(demo, "write_report", lambda *args, **kwargs: None)
    for top1, status in ((0.83, 1), (0.85, 0)):
        monkeypatch.setattr(demo, "_top1", lambda run, top1=top1: top1)
        assert demo.run_demo(tmp_path, None) == status
        assert ("FAILED" in capsys.readouterr().out) == bool(status)
