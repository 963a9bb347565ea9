"""What a live teacher takes beside the student is known before it is loaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sret_scale.config.run_config import RunConfig, override
from sret_scale.distill.footprint import TeacherBytes, teacher_bytes
from sret_scale.memory import MemoryConfig
from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.model import SReT, preset
from sret_scale.timm import import_timm
from sret_scale.train.recomputation import set_up_recomputation

CONTROL = preset("demo_control_20")


def untrained(_run: Path) -> tuple[nn.Module, int]:
    with torch.device("meta"):
        return SReT(CONTROL), CONTROL.image_size


def bytes_of(spec: str) -> TeacherBytes:
    return teacher_bytes(spec, num_classes=10, micro_batch_size=3, precision="fp32", untrained_run=untrained)


def measured(module: nn.Module, image_size: int) -> TeacherBytes:
    """By running it."""
    module = module.eval().requires_grad_(False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    images_BCHW = torch.randn(3, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), LiveBytes() as counter:
        module(images_BCHW)
    return TeacherBytes(weights=weights, forward=counter.peak + images_BCHW.nbytes)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_bytes_of_an_architecture_are_those_of_the_loaded_network(name: str) -> None:
    network = import_timm().create_model(name, pretrained=False)
    size = import_timm().data.resolve_model_data_config(network)["input_size"][-1]
    found, expected = bytes_of(f"timm:{name}"), measured(network, size)
    assert found.weights == expected.weights
    assert found.forward == pytest.approx(expected.forward, rel=0.05)


@pytest.mark.lengthy
def test_run_is_counted_from_its_configuration_and_labels_take_nothing(tmp_path: Path) -> None:
    found, expected = bytes_of(f"run:{tmp_path}"), measured(SReT(CONTROL), CONTROL.image_size)
    assert found.weights == expected.weights
    assert found.forward == pytest.approx(expected.forward, rel=0.05)
    assert bytes_of("labels:anywhere").total == 0


@pytest.mark.lengthy
def test_joined_teachers_are_all_held_and_answer_in_turn() -> None:
    small, large = bytes_of("timm:resnet10t"), bytes_of("timm:vit_tiny_patch16_224")
    both = bytes_of("timm:resnet10t+timm:vit_tiny_patch16_224")
    assert both.weights == small.weights + large.weights
    assert both.forward == max(small.forward, large.forward)


@pytest.mark.lengthy
def test_budget_of_a_run_leaves_room_for_its_teacher() -> None:
    budget = MemoryConfig(schedule="planned", budget_bytes=90 * 2**20)
    config = override(
        RunConfig(model=CONTROL, memory=budget), ["train.micro_batch_size=8", "train.global_batch_size=8"]
    )
    assert set_up_recomputation(SReT(CONTROL), config, world_size=1).plan is not None
    taught = override(config, ["distill.teacher=timm:resnet18"])
    with pytest.raises(ValueError, match="memory: micro-batch 8 needs at least"):
        set_up_recomputation(SReT(CONTROL), taught, world_size=1)
