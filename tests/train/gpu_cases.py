"""What `test_gpu_fake.py` runs on the fake GPU, in one process: each case prints a line of JSON with what it noted."""

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.captured import TrainingStep
from data_pipelines.image.augment import AugmentConfig, BatchAugment, normalise_
from data_pipelines.labels.records import decode_records, record_dtype
from data_pipelines.stream.prefetch import Batch
from sret_scale.config.run_config import OptimConfig, RunConfig
from sret_scale.distill import DistillConfig, distillation_loss
from sret_scale.memory import MemoryConfig, apply_recomputation
from sret_scale.model import Noise, SReT, SReTConfig, StageConfig
from sret_scale.model.depth_plan import DepthPlan, StageDepth
from sret_scale.tasks.classification import Classification
from sret_scale.train.engine.clip import measure
from sret_scale.train.engine.zero_layout import live_gradients
from sret_scale.train.optim import WeightAverage, build_optimizer
from sret_scale.train.telemetry.depth_probe import probe
from tests.train.fake_gpu import CUDA, WatchedGpu, pretend

Case = Callable[[WatchedGpu], None]
STAGE = {"width": 12, "num_heads": 2, "num_blocks": 1, "num_loops": 3, "groups": (4, 2), "mlp_ratio": 1.5}
COLUMNS = {"images": torch.uint8, "labels": torch.int64, "indices": torch.int64, "valid": torch.bool} | {
    "views": torch.int32,
    "view_numbers": torch.int32,
}
CUT = DepthPlan((StageDepth((0, 2), num_detached=1),))

# What of a model's config, with its schedule of recomputation and its depth, takes another way through the code.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any], str, DepthPlan | None]] = {
    "published": ({}, {"drop_path": 0.1, "stem_norm": "batch"}, "none", None),
    "padded": ({"norm_placement": "subln"}, {"padded": True, "stem_norm": "layer"}, "none", None),
    "binomial": ({"num_blocks": 2}, {"drop_path": 0.1, "stem_norm": "batch"}, "binomial", None),
    "segments": ({"loop_order": "model", "num_blocks": 2}, {"dropout": 0.1}, "segments", None),
    "sync batch": ({"norm_placement": "deepnorm"}, {"stem_norm": "sync_batch"}, "nested", None),
    "norm by depth": ({"conditioning": "norm_by_depth"}, {}, "none", CUT),
    "norm per loop": ({"conditioning": "norm_per_loop", "branch_scheme": "layerscale"}, {}, "none", None),
    "low rank": ({"conditioning": "low_rank", "branch_scheme": "rezero"}, {}, "per_application", None),
    "input gated": ({"conditioning": "input_gated", "projections": "none"}, {}, "per_application", None),
    "no slices": ({"groups": (1,), "skip": "frozen"}, {"stem_norm": "group"}, "none", None),
}


def build_model(stage: dict[str, Any], options: dict[str, Any]) -> SReT:
    """A model of one stage on the GPU."""
    config = SReTConfig(
        stages=(StageConfig(**{**STAGE, **stage}),),
        **{"image_size": 16, "num_classes": 5, "stem_strides": (2, 1, 1), "stem_norm": "layer", **options},
    )
    return SReT(config).to(CUDA).train()


def forward_and_backward(name: str, gpu: WatchedGpu) -> None:
    """A step in bf16 gives every parameter that took part a gradient of its own type, on its device."""
    stage, options, schedule, plan = STEPS[name]
    model = build_model(stage, options)
    apply_recomputation(model, MemoryConfig(schedule=schedule), repeats_norms=schedule != "none")
    images_BCHW, labels_B = torch.empty(4, 3, 16, 16, device=CUDA), torch.empty(4, dtype=torch.int64, device=CUDA)
    gpu.waits.clear()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        scores = model(images_BCHW, Noise(1, 2)) if plan is None else model(images_BCHW, Noise(1, 2), [plan])[0]
    loss = distillation_loss(scores, torch.empty_like(scores), F.one_hot(labels_B, 5), DistillConfig(hard_weight=0.5))
    loss.backward()
    gradients = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    assert plan is not None or len(gradients) == len(list(model.parameters())), "every parameter has a gradient"
    assert all(value.device == CUDA and value.dtype == torch.float32 for value in gradients.values())


def mix(gpu: WatchedGpu) -> None:
    """Pixels to what the model sees, with noise in boxes, mixing and stored labels."""
    images_BCHW = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device=CUDA)
    drawn: Any = ({"randaugment_ops": 40, "policy": policy} for policy in ("torchvision", "timm"))
    mixed = {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"erase_rate": 1.0}
    options: Any
    for options in (*drawn, *mixed, {"three_augment_rate": 1.0, "color_jitter": 0.3}):
        off: Any = {"randaugment_ops": 0, "erase_rate": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "mix_rate": 1.0}
        augment = BatchAugment(AugmentConfig(**{**off, **options}), 5)
        unit_BCHW, _ = augment(images_BCHW, torch.empty(4, dtype=torch.int64, device=CUDA), seed=3)
        normalise_(unit_BCHW, (0.5, 0.4, 0.3), (0.5, 0.4, 0.3))
    probs_BC = decode_records(np.zeros(4, record_dtype(3)), 5, CUDA)
    assert unit_BCHW.device == probs_BC.device == CUDA


def update(rule: str, gpu: WatchedGpu) -> None:
    """The optimiser, twice, and the moving average; the norms of a step are read once, on purpose."""
    model = build_model({}, {})
    optimizer = build_optimizer(model, model.parameter_tags(), OptimConfig(optimizer=rule))  # type: ignore[arg-type]
    average = WeightAverage(model.state_dict(), 100)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    gpu.waits.clear()
    for _ in range(2):
        optimizer.step()
    average.update(model.state_dict(), 8)
    assert not gpu.waits
    gradients = live_gradients(0, optimizer, optimizer.layout, False)
    measure(gradients, optimizer.layout, optimizer.param_groups, used=set(), num_copies=1, loss_scale=1.0, device=CUDA)
    assert len(gpu.waits) == 1 and "tolist" in next(iter(gpu.waits)), gpu.waits
    gpu.waits.clear()


def evaluation(gpu: WatchedGpu) -> None:
    """The counts of a batch."""
    columns = {name: torch.empty(4, dtype=kind, device=CUDA) for name, kind in COLUMNS.items()}
    batch = Batch(**{**columns, "valid": torch.ones(4, dtype=torch.bool)}, maps={})
    Classification(RunConfig()).counts(torch.empty(4, 5, device=CUDA), batch)


def telemetry(gpu: WatchedGpu) -> None:
    """A probe reads its numbers in the end; before, nothing waits."""

    def loss_of(scores_BC: Tensor) -> Tensor:
        return F.cross_entropy(scores_BC.float(), torch.empty(4, dtype=torch.int64, device=CUDA))

    model, images_BCHW = build_model({}, {}), torch.empty(4, 3, 16, 16, device=CUDA)
    gpu.waits.clear()
    probe(model, images_BCHW, loss_of, Noise(1, 2), "bf16")
    assert all("a number is read" in wait for wait in gpu.waits), gpu.waits
    gpu.waits.clear()


def captured(gpu: WatchedGpu) -> None:
    """A step that a CUDA graph can hold: no wait, no shape that depends on data, nothing drawn."""
    model = build_model({"conditioning": "norm_per_loop"}, {"stem_norm": "batch", "padded": True})
    step = TrainingStep(model, model, 4, CUDA)
    gpu.waits.clear()
    step.run()
    step.refill(1)


def hidden_waits(gpu: WatchedGpu) -> None:
    """What the watch is for: each line makes the host wait."""
    values = torch.empty(4, device=CUDA)
    gpu.waits.clear()
    torch.tensor([1.0, 2.0], device=CUDA)
    values.new_tensor([1.0])
    values.cpu()
    values.sum().item()
    torch.ones(4).to(CUDA, non_blocking=True)  # from pageable memory
    torch.ones(4).pin_memory().to(CUDA, non_blocking=True)  # this one does not
    _ = values[torch.zeros(2, dtype=torch.int64)]


CASES: dict[str, Case] = {
    **{f"step: {name}": partial(forward_and_backward, name) for name in STEPS},
    **{f"update: {rule}": partial(update, rule) for rule in ("adamw", "lamb", "muon")},
    "mix": mix,
    "evaluation": evaluation,
    "telemetry": telemetry,
    "captured": captured,
    "hidden waits": hidden_waits,
}


def main() -> None:
    """Runs all cases, or those that the command line names."""
    pretend()
    for name in sys.argv[1:] or CASES:
        gpu, error = WatchedGpu(), None
        try:
            with gpu:
                CASES[name](gpu)
        except Exception:
            error = traceback.format_exc()[-1500:]
        print(json.dumps({"case": name, "waits": gpu.waits, "draws": gpu.draws, "error": error}), flush=True)


if __name__ == "__main__":
    main()
