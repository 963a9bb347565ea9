"""One rank of the test of a sharded teacher: `python -m tests.ranks.teacher_ranks OUT`; the environment names it."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sret_scale.distill import build_teacher
from sret_scale.train.distributed import leave, ranks_from_environment
from sret_scale.train.engine.engine import shard_frozen, start_communication

LAYERS, WIDTH = 10, 192


def wide() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """Ten equal layers with norms, after a small convolution."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 2, stride=2), nn.BatchNorm2d(3), nn.Flatten()]
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10)), (0.5,) * 3, (0.5,) * 3, 16


def held_bytes(module: nn.Module) -> int:
    """Bytes of weights in this rank's memory now: its parts and what is gathered."""
    tensors = [tensor for value in module.parameters() for tensor in (value.data, getattr(value, "ds_tensor", None))]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in storages.values())


def ask(precision: str, rank: int) -> dict[str, Any]:
    """What a whole and a sharded teacher answer, and the most that the sharded one held at the start of any layer."""
    spec = f"module:{wide.__module__}:wide"
    options: dict[str, Any] = {"num_classes": 10, "device": "cpu", "load_run": None, "micro_batch_size": 3}
    whole: Any = build_teacher(spec, precision=precision, **options)  # type: ignore[arg-type]
    shard = functools.partial(shard_frozen, max_live_parameters=0)
    teacher: Any = build_teacher(spec, precision=precision, shard=shard, **options)  # type: ignore[arg-type]
    held: list[int] = []
    for layer in teacher._module.modules():
        layer.register_forward_pre_hook(lambda *args: held.append(held_bytes(teacher._module)))
    unit = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    logits = teacher(unit)
    student = nn.Linear(10, 10)
    (gradient,) = torch.autograd.grad(nn.functional.mse_loss(student(logits), logits), student.weight)
    return {
        "is_equal": torch.equal(logits, whole(unit)),
        "total_bytes": held_bytes(whole._module),
        "peak_bytes": max(held),
        "gradient": float(gradient.abs().sum()),
    }


def main(out: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    result = {precision: ask(precision, ranks.rank) for precision in ("fp32", "bf16")}
    out.with_suffix(f".{ranks.rank}").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
