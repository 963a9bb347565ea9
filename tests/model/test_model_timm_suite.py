"""timm's own test suite on our models and on recursive backbones.

It is in timm's repository and not in its wheel: SRET_TIMM_TESTS names the folder that holds `test_models.py` (a
checkout's `tests`). Left out: what torch.fx and TorchScript trace, since a depth plan makes the chain in Python.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT, environment

TESTS = os.environ.get("SRET_TIMM_TESTS")
pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.slow,
    pytest.mark.skipif(TESTS is None, reason="SRET_TIMM_TESTS does not name the folder of timm's tests"),
]


@pytest.mark.parametrize("names, least", [("sret and not 1000 and not 300 and not 512", 45), ("recursive", 20)])
def test_timms_tests_pass(names: str, least: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "timm_names",
        "-W",
        "ignore",
    ]
    # Weights come from a network.
    words = f"({names}) and not fx and not torchscript and not load_pretrained"
    file = str(Path(TESTS or "") / "test_models.py")
    result = subprocess.run(
        [*command, "-o", "addopts=", file, "-k", words],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) >= least, result.stdout[-500:]
