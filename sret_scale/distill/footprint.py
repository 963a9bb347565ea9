"""The bytes that a live teacher adds to a rank, for the planner: known from its architecture, without its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sret_scale.distill.networks import Network, load_network
from sret_scale.distill.spec import TeacherSpec, parse_teacher
from sret_scale.distill.teacher import Precision, freeze
from sret_scale.memory.planning.costs import size_bytes
from sret_scale.memory.planning.instrument import LiveBytes

Untrained = Callable[[Path], tuple[nn.Module, int]]
"""A run's folder -> its model on the meta device and its image size."""


@dataclass(frozen=True, kw_only=True)
class TeacherBytes:
    """weights: of all teachers. forward: the most activation bytes at once of one forward pass, its input included."""

    weights: int = 0
    forward: int = 0

    @property
    def total(self) -> int:
        """What a rank holds that has the teachers whole."""
        return self.weights + self.forward


def teacher_bytes(
    spec: str, *, num_classes: int, micro_batch_size: int, precision: Precision, untrained_run: Untrained
) -> TeacherBytes:
    """The bytes of the teachers that `spec` joins, which answer one after another.

    Images enter in fp32 at the teacher's own size. Stored labels need none. Raises ValueError for a spec that names
    nothing; published weights are not downloaded.
    """
    weights = passes = 0
    for part in parse_teacher(spec):
        if part.kind == "labels":
            continue
        module, image_size = _architecture(part, num_classes, untrained_run)
        freeze(module, torch.device("meta"), precision)
        weights += sum(size_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
        (size,) = part.numbers("size", (image_size,))
        passes = max(passes, _forward_bytes(module, (micro_batch_size, part.channels, int(size), int(size)), precision))
    return TeacherBytes(weights=weights, forward=passes)


def _architecture(part: TeacherSpec, num_classes: int, untrained_run: Untrained) -> tuple[nn.Module, int]:
    if part.kind == "timm":
        # Importing timm takes seconds, which only this kind of teacher should cost.
        from sret_scale.timm import create_architecture, preprocessing

        module = create_architecture(
            part.value, num_classes=num_classes if "checkpoint" in part.options else None, channels=part.channels
        )
        return module, preprocessing(module)[2]
    if part.kind == "run":
        return untrained_run(Path(part.value))
    network: Network = load_network(part, num_classes=num_classes, load_run=_no_run)
    return network.module, network.image_size


def _no_run(_folder: Path) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    raise AssertionError("runs are built from their configuration")


def _forward_bytes(module: nn.Module, shape: tuple[int, int, int, int], precision: Precision) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        images_BCHW = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            LiveBytes() as counter,
        ):
            module(images_BCHW)
    return counter.peak + size_bytes(images_BCHW)
