"""Models made ready for inference, and exported."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx
import onnxruntime
import pytest
import torch

from sret_scale.cli import main
from sret_scale.model import SReT, SReTConfig, StackModel, StageConfig
from sret_scale.model.config import BranchScheme, ConditioningKind, LoopOrder, NormPlacement
from sret_scale.model.loop_export import keep_loops
from sret_scale.model.vision import for_inference as inference
from sret_scale.model.vision.for_inference import folded
from sret_scale.model.vision.weight_files import load_model, save_model

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
def test_folding_changes_nothing(scheme: BranchScheme, placement: NormPlacement) -> None:
    stage = replace(STAGE, branch_scheme=scheme, norm_placement=placement)
    model = model_of(replace(CONFIG, stages=(stage,))).double()
    images_BCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    small = folded(model)
    torch.testing.assert_close(small(images_BCHW), model(images_BCHW), rtol=0, atol=1e-12)
    assert not any("beta" in name for name, _ in small.named_parameters())
    assert any("beta" in name for name, _ in model.named_parameters())


def nodes_and_bytes(config: SReTConfig, folder: Path, loops: str) -> tuple[int, int]:
    """Nodes of the ONNX program in all its graphs, and the size of its file."""
    save_model(model_of(config), folder / "model.safetensors")
    out = folder / "model.onnx"
    assert main(["export", str(folder / "model.safetensors"), str(out), "--loops", loops]) == 0
    model = onnx.load(out)
    graphs, count = [model.graph, *model.functions], 0
    while graphs:
        graph = graphs.pop()
        count += len(graph.node)
        graphs.extend(attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return count, out.stat().st_size


@pytest.mark.lengthy
def test_a_program_with_kept_loops_does_not_grow(tmp_path: Path) -> None:
    stage = replace(STAGE, groups=(1,), projections="per_block")
    few, many = (
        nodes_and_bytes(replace(CONFIG, stages=(replace(stage, num_loops=loops),)), tmp_path, "kept")
        for loops in (4, 40)
    )
    assert many[0] == few[0]
    # A counter of the turns, 4 bytes each, is all that a loop without weights of its own adds.
    assert many[1] - few[1] <= 36 * 4 + 40


@pytest.mark.lengthy
@pytest.mark.parametrize("loop_order", get_args(LoopOrder))
def test_kept_loops_store_what_blocks_share_once(loop_order: LoopOrder, tmp_path: Path) -> None:
    # Two blocks with one projection a loop, and a permutation each.
    stage = replace(STAGE, num_blocks=2, projections="per_loop", loop_order=loop_order)
    few, many = (replace(CONFIG, stages=(replace(stage, num_loops=loops),)) for loops in (4, 40))
    grown = nodes_and_bytes(many, tmp_path, "kept")[1] - nodes_and_bytes(few, tmp_path, "kept")[1]
    weights, more = (sum(value.numel() * 4 for value in model_of(config).parameters()) for config in (few, many))
    indices = 2 * 36 * 64 * 8
    # Stored once for each block, the weights alone would come twice.
    assert indices < grown < 1.5 * (more - weights) + indices


@pytest.mark.lengthy
@pytest.mark.parametrize("loop_order", get_args(LoopOrder))
@pytest.mark.parametrize("conditioning", ["none", "norm_per_loop", "norm_by_depth", "low_rank", "input_gated"])
def test_kept_loops_change_nothing(loop_order: LoopOrder, conditioning: ConditioningKind) -> None:
    """Slices that differ by loop, permutations, projections per loop and shared, zeros in padded storage."""
    stage = replace(STAGE, width=6, num_blocks=2, num_loops=4, loop_order=loop_order, conditioning=conditioning)
    stages = (stage, replace(stage, width=12, groups=(1,), projections="per_block"))
    model = model_of(replace(CONFIG, stages=stages, padded=conditioning == "low_rank")).double()
    images_BCHW = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    looped = folded(model)
    keep_loops(looped)
    with torch.no_grad():
        torch.testing.assert_close(looped(images_BCHW), model(images_BCHW), rtol=0, atol=1e-12)


def test_weights_alone_have_no_loops_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "model.safetensors", "out", "--format", "safetensors", "--loops", "kept"]
    assert main(arguments) == 2
    assert "holds weights and no program" in capsys.readouterr().err


def scores(file: Path, file_format: str, images_BCHW: torch.Tensor) -> torch.Tensor:
    """What an exported file answers."""
    if file_format == "safetensors":
        return load_model(file).eval()(images_BCHW)
    if file_format == "torch":
        return torch.export.load(file).module()(images_BCHW)
    session = onnxruntime.InferenceSession(str(file))
    return torch.from_numpy(session.run(["scores"], {"images": images_BCHW.numpy()})[0])


@pytest.mark.lengthy
@pytest.mark.parametrize("file_format", ["onnx", "torch", "safetensors"])
def test_export_agrees_with_the_model(file_format: str, tmp_path: Path) -> None:
    save_model(model := model_of(CONFIG), tmp_path / "model.safetensors")
    out = tmp_path / f"model.{file_format}.out"
    assert main(["export", str(tmp_path / "model.safetensors"), str(out), "--format", file_format]) == 0
    assert not out.with_name(out.name + ".partial").exists()
    for batch in (1, 5):
        images_BCHW = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = model(images_BCHW)
            found = scores(out, file_format, images_BCHW)
        assert expected.shape == (batch, 5) and expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.lengthy
@pytest.mark.parametrize("loops", ["unrolled", "kept"])
@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_an_export_with_other_weights_is_refused(
    file_format: str, loops: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def altered(model: SReT) -> StackModel:
        small = folded(model)
        with torch.no_grad():
            small.head.bias[2] += 1e-3
        return small

    monkeypatch.setattr(inference, "folded", altered)
    save_model(model_of(CONFIG), tmp_path / "model.safetensors")
    out = tmp_path / "out"
    arguments = ["export", str(tmp_path / "model.safetensors"), str(out), "--format", file_format, "--loops", loops]
    assert main(arguments) == 2
    assert "differs from the model by 1.0e-03" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_random_permutations_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model_of(replace(CONFIG, permutation="random")), tmp_path / "model.safetensors")
    assert main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 2
    assert "use 'fixed'" in capsys.readouterr().err
