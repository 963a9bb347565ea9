"""A whole training step of fixed depth, and its capture as a CUDA graph.

A captured step reads and writes the same memory in every replay, so its images, labels and permutations lie in buffers
that are refilled before it. Everything but `capture` runs on a CPU too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model import Noise, SReT, Stage

WARM_UP_STEPS = 3


class StaticPermutations:
    """Stands in for a stage's `permutations`: a table at a fixed address, refilled by the source that it replaces."""

    def __init__(self, stage: Stage, num_tokens: int, device: torch.device) -> None:
        self.source = stage.permutations
        self.count = sum(slot.permuted for slot in stage.slots)
        self.num_tokens, self.device = num_tokens, device
        self.table = self._drawn(Noise(0, 0))
        stage.permutations = self

    def _drawn(self, noise: Noise) -> Tensor:
        return self.source(noise, self.count, self.num_tokens, self.device)

    def refill(self, noise: Noise) -> None:
        """Draws the permutations of a step."""
        self.table.copy_(self._drawn(noise))

    def __call__(self, noise: Noise | None, count: int, num_tokens: int, device: torch.device) -> Tensor:
        assert (count, num_tokens) == self.table.shape
        return self.table


class TrainingStep:
    """Forward pass in bf16, backward pass and AdamW on one batch. ValueError for what a replay could not draw anew.

    The learning rate is 0, which costs the same and leaves every step with the same loss to compare.
    """

    def __init__(self, model: SReT, module: nn.Module, batch: int, device: torch.device) -> None:
        """module: the model, or what runs its weights in another way (the plain twin)."""
        config = model.config
        if config.drop_path or config.dropout:
            raise ValueError(
                "a captured step draws no masks: drop_path and dropout must be 0, got "
                f"{config.drop_path} and {config.dropout}"
            )
        self.module, self.device = module.train(), device
        generator = torch.Generator().manual_seed(0)
        shape = (batch, config.in_channels, config.image_size, config.image_size)
        self.images_BCHW = torch.randn(shape, generator=generator).to(device)
        self.labels_B = torch.randint(config.num_classes, (batch,), generator=generator).to(device)
        self.tables = [
            StaticPermutations(cast(Stage, stage), config.grids[index] ** 2, device)
            for index, stage in enumerate(model.stages)
        ]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        self.loss = torch.zeros((), device=device)

    def refill(self, step: int) -> None:
        """What changes from step to step and lies in buffers; a real run copies its images here too."""
        for table in self.tables:
            table.refill(Noise(step, step))

    def run(self) -> None:
        """The step, on what lies in the buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
            scores_BC = self.module(self.images_BCHW, Noise(0, 0))
        loss = F.cross_entropy(scores_BC.float(), self.labels_B)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())


@dataclass(frozen=True)
class Capture:
    """A captured step. seconds: to warm up and capture; pool_bytes: what the allocator set aside for its tensors;
    graph_bytes: what the driver took besides."""

    replay: Callable[[], None]
    seconds: float
    pool_bytes: int
    graph_bytes: int


def capture(step: TrainingStep) -> Capture:
    """The step as a CUDA graph, after a warm-up on a side stream, so that nothing is compiled or chosen inside."""
    start = time.perf_counter()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    # Gradients must be born inside, in the graph's own memory.
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before, reserved_before = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream current, on which nothing could run afterwards.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        step.run()
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    pool_bytes = torch.cuda.memory_reserved() - reserved_before
    taken_bytes = free_before - torch.cuda.mem_get_info()[0]
    return Capture(graph.replay, time.perf_counter() - start, pool_bytes, taken_bytes - pool_bytes)
