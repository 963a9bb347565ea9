"""A trace of some steps: written once, when they are done or at the end, and only where it was asked for."""

import json
from pathlib import Path

import pytest
import torch

from sret_scale.train.telemetry.profile import step_profiler
from tests.forked import sret_scale_forked
from tests.tiny import tiny_config, tiny_shards, write_config


@pytest.mark.parametrize("num_run", [3, 9])
def test_the_trace_has_the_steps_that_were_asked_for(num_run: int, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    said: list[str] = []
    with step_profiler(file, 2, said.append) as step_is_done:
        for number in range(num_run):
            torch.ones(2, 2).mul(number)
            assert file.exists() == (number > 4)
            step_is_done()
    events = json.loads(file.read_text())["traceEvents"]
    assert len({one["name"] for one in events if one["name"].startswith("ProfilerStep#")}) == (2 if num_run > 4 else 1)
    assert len(said) == 1 and str(file) in said[0]


@pytest.mark.multi_process
def test_a_run_leaves_a_trace_of_its_steps(tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", tiny_config(tiny_shards(tmp_path / "shards")), total_images=192)
    ended = sret_scale_forked(
        "train", file, "train.profile_steps=1", "--run", tmp_path / "run", "--ranks", "1", cwd=tmp_path
    )
    assert ended.returncode == 0 and "profile of 1 steps: " in ended.stdout
    events = json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    assert {"aten::linear", "aten::addmm"} & {event["name"] for event in events}
