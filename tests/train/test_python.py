"""The page on Python without DeepSpeed: its loops run as they stand there, on a small model and few steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sret_scale
from tests.tiny import ROOT, environment, tiny_shards

PAGE = (ROOT / "docs" / "python.md").read_text()
SHORT, WHOLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SMALL = {
    "micro_batch_size=64": "micro_batch_size=4, image_size=28",
    "(shards, micro_batch_size=batch_size)": "(shards, micro_batch_size=batch_size, image_size=28)",
    "sret_t": "demo_control_20",
    '("shards/val")': '("shards/test")',
    "batch_size, num_steps": "batch_size, num_steps, stop",
    "64, 10_000, ": "4, 4, int(sys.argv[1]), ",
    "import pathlib, ": "import pathlib, sys, ",
    "range(first, num_steps)": "range(first, stop)",
    "step + 1 == num_steps": "step + 1 == stop",
}


def small(text: str) -> str:
    for old, new in SMALL.items():
        text = text.replace(old, new)
    return text


def run(code: str, folder: Path, *words: str) -> str:
    (folder / "loop.py").write_text(code)
    command = [sys.executable, "-P", "loop.py", *words]
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    tiny_shards(folder / "shards")
    return folder


@pytest.mark.multi_process
def test_seven_lines_train(folder: Path) -> None:
    assert len([line for line in SHORT.splitlines() if line]) == 7
    code = small(SHORT).replace("for batch in loader:", "for batch, _ in zip(loader, range(3)):")
    end = "print(optimizer.state[model.head.bias]['step'], 'deepspeed' in sys.modules)\n"
    assert run("import sys\n" + code + end, folder) == "tensor(3.) False\n"


@pytest.mark.multi_process
def test_thirty_lines_are_the_whole_of_it_and_continue(folder: Path, tmp_path: Path) -> None:
    assert len(WHOLE.splitlines()) <= 34
    (tmp_path / "shards").symlink_to(folder / "shards")
    run(small(WHOLE), tmp_path, "2")
    out = run(small(WHOLE), tmp_path, "4")
    assert "'top1':" in out and "num_samples=128" in out
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["step"] == 4 and sret_scale.LoaderState.from_json(saved["position"]).position == 16
    model = sret_scale.load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, saved["states"][0][name]) for name, value in model.model.cpu().state_dict().items())
    assert model.class_names == sret_scale.open_shards(folder / "shards" / "train").class_names


def test_every_name_is_on_the_page() -> None:
    table = PAGE.partition("## Names")[2]
    assert sorted(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == sorted(
        sret_scale.__all__
    )
    assert all(hasattr(sret_scale, name) for name in sret_scale.__all__)
