"""A run in the calling process, without launcher or agent: for a debugger, with the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import sret_scale_forked
from tests.runs import digest
from tests.tiny import environment, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.multi_process


def test_a_run_without_a_launcher_ends_with_the_weights_of_one_with_it(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_config(tiny_shards(tmp_path / "shards")), total_images=128)
    launched = sret_scale_forked("train", config, "--run", tmp_path / "launched", "--ranks", "1", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    alone = tmp_path / "alone" / "config.yaml"
    alone.parent.mkdir()
    alone.write_text((tmp_path / "launched" / "config.yaml").read_text())
    command = [sys.executable, "-P", "-m", "sret_scale.train.main", str(alone)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert digest(alone.parent) == digest(tmp_path / "launched")
    assert '"finished"' in (alone.parent / "status.json").read_text()
    other = [*command[:-1], str(tmp_path / "tiny.yaml")]
    refused = subprocess.run(other, env=environment(), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert refused.returncode == 2 and "expected RUN/config.yaml, the run to train" in refused.stderr
