"""Models made ready for inference, and exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sret_scale.cli import main
from sret_scale.model import SReT, SReTConfig, StageConfig
from sret_scale.model.files import save_model
from sret_scale.model.inference import folded

STAGE = StageConfig(width=8, num_heads=2, num_blocks=1, num_loops=3, groups=(4, 2), mlp_ratio=1.5)
CONFIG = SReTConfig(stages=(STAGE,), image_size=16, num_classes=5, stem_strides=(2, 1, 1))


def model_of(config: SReTConfig) -> SReT:
    torch.manual_seed(0)
    model = SReT(config)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return model.eval()


@pytest.mark.parametrize("scheme", ["published", "loop_aware", "layerscale"])
@pytest.mark.parametrize("placement", ["pre", "subln", "deepnorm"])
def test_folding_changes_nothing(scheme: str, placement: str) -> None:
    stage = replace(STAGE, branch_scheme=scheme, norm_placement=placement)
    model = model_of(replace(CONFIG, stages=(stage,))).double()
    images_BCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    small = folded(model)
    torch.testing.assert_close(small(images_BCHW), model(images_BCHW), rtol=0, atol=1e-12)
    assert not any("beta" in name for name, _ in small.named_parameters())
    assert any("beta" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("file_format", ["onnx", "torch", "safetensors"])
def test_export_agrees_with_the_model(file_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model_of(CONFIG), tmp_path / "model.safetensors")
    out = tmp_path / f"model.{file_format}.out"
    assert main(["export", str(tmp_path / "model.safetensors"), str(out), "--format", file_format]) == 0
    assert out.stat().st_size > 1000
    assert not out.with_name(out.name + ".partial").exists()


def test_random_permutations_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model_of(replace(CONFIG, permutation="random")), tmp_path / "model.safetensors")
    assert main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 2
    assert "use 'fixed'" in capsys.readouterr().err
