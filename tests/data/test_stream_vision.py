"""The door to torchvision opens on a CPU build of torch, also after a first import has failed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipelines.image.torchvision_door import torchvision, v2

pytestmark = pytest.mark.multi_process

ROOT = Path(__file__).parents[2]


def test_transforms_work() -> None:
    image_CHW = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    assert torchvision.__version__
    assert v2.Resize(4)(image_CHW).shape == (3, 4, 4)


def test_libraries_that_import_torchvision_work_behind_the_door() -> None:
    program = "import data_pipelines.image.torchvision_door, timm.data; timm.data.create_transform(32)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
