"""When a run is probed, and the record of a probe as metrics.jsonl holds it (docs/depth.md has the format)."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sret_scale.config.precision import Precision
from sret_scale.config.telemetry_config import TelemetryConfig
from sret_scale.model import Noise, StackModel
from sret_scale.model.applications import resolved_scheme
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.train.telemetry.alarms import alarms, findings, growth_per_loop
from sret_scale.train.telemetry.depth_probe import BlockUses, probe, undisturbed
from sret_scale.train.telemetry.truncation import gradient_cosines

MAX_LOOPS = 32
"""Loops of a block that a record has; deeper ones are thinned evenly. 1000 applications are then about 25 kB."""


class Telemetry:
    """Probes a model before the step's forward pass, and measures its parameters around the update."""

    def __init__(self, model: StackModel, config: TelemetryConfig, precision: Precision) -> None:
        self._model, self._config, self._precision = model, config, precision
        self._schemes = [resolved_scheme(stage) for stage in model.config.stages]
        self._kinds: dict[str, list[str]] = {}
        for name, tag in model.parameter_tags().items():
            self._kinds.setdefault(tag.kind, []).append(name)
        self._record: dict[str, Any] | None = None
        self._found: set[tuple[int, str]] = set()
        self.new_alarms: list[str] = []
        """Of the last probe: sentences whose stage and kind the run has not told of before."""
        self._told: set[tuple[int, str]] = set()
        self._before: dict[str, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether the update number `step` (the first is 0) is looked at."""
        return self._config.interval_steps > 0 and step % self._config.interval_steps == 0

    def look(
        self,
        images_BCHW: Tensor,
        loss_of: Callable[[Tensor, slice], Tensor],
        noise: Noise,
        plan: DepthPlan | None = None,
    ) -> None:
        """Probe the first images of a micro-batch; `loss_of` gives the loss of their scores and of that part of it.

        plan: the depth of the step. All loops are probed; of detached ones the gradient's error is measured.
        """
        started = time.perf_counter()
        part = slice(0, self._config.num_images)
        images_BCHW = images_BCHW[part]
        blocks = probe(self._model, images_BCHW, lambda scores: loss_of(scores, part), noise, self._precision)
        truncation = {}
        if plan is not None and any(stage.num_detached for stage in plan.stages):
            with undisturbed(self._model, images_BCHW.device, self._precision):
                cosines = gradient_cosines(
                    self._model, images_BCHW, lambda scores: loss_of(scores, part), noise, plan, self._kinds
                )
            truncation = {"truncation": {kind: _json_number(value) for kind, value in cosines.items()}}
        found = findings(blocks, self._schemes, self._precision)
        raised = alarms(found, self._found)
        self._record = {
            "num_images": len(images_BCHW),
            "blocks": [_entry(block) for block in blocks],
            "summary": summary(blocks),
            "alarms": list(raised.values()),
            "probe_s": round(time.perf_counter() - started, 4),
            **truncation,
        }
        self._found = set(found)
        self.new_alarms = [sentence for key, sentence in raised.items() if key not in self._told]
        self._told |= set(raised)

    def before_update(self) -> None:
        """Keep the weights, if this step is looked at."""
        if self._record is not None:
            self._before = {name: value.detach().clone() for name, value in self._model.named_parameters()}

    def after_update(self) -> dict[str, Any] | None:
        """The record of this step, norms of weights and updates included; None if it was not looked at."""
        record, self._record = self._record, None
        if record is None:
            return None
        before, self._before = self._before, {}
        return record | {"classes": class_norms(self._kinds, before, dict(self._model.named_parameters()))}


def telemetry_of(
    model: StackModel, config: TelemetryConfig, precision: Precision, *, is_main: bool, zero_stage: int
) -> Telemetry | None:
    """The telemetry of a rank: of rank 0 alone, and none where no rank has whole parameters."""
    return Telemetry(model, config, precision) if is_main and zero_stage < 3 and config.interval_steps else None


@torch.no_grad()
def class_norms(
    kinds: Mapping[str, list[str]], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """L2 norm of each class of parameters after an update, and of the update."""
    found = {}
    for kind, names in kinds.items():
        new, old = [after[name].detach() for name in names], [before[name] for name in names]
        norms = torch.stack([_norm(new), _norm(torch._foreach_sub(new, old))]).tolist()
        found[kind] = dict(zip(("norm", "update"), map(_json_number, norms), strict=True))
    return found


def summary(blocks: Sequence[BlockUses]) -> dict[str, dict[str, float]]:
    """A few numbers a stage, for event files: means over blocks and loops, the extremes, the growth of a loop."""
    found: dict[str, dict[str, float]] = {}
    for stage in sorted({block.stage for block in blocks}):
        own = [block for block in blocks if block.stage == stage]
        means = {name: _mean(value for block in own for value in block.values[name]) for name in own[0].values}
        numbers = means | {
            "rms_last": own[-1].values["rms"][-1],
            "max_abs": max(max(block.values["max_abs"]) for block in own),
            "growth_per_loop": max(growth_per_loop(block.values["rms"]) for block in own),
            "gradient_agreement": _mean(block.gradient_agreement for block in own),
        }
        known = {name: _json_number(value) for name, value in numbers.items()}
        found[f"stage_{stage}"] = {name: value for name, value in known.items() if value is not None}
    return found


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).norm()


def _entry(block: BlockUses) -> dict[str, Any]:
    num_loops = len(block.values["rms"])
    count = min(num_loops, MAX_LOOPS)
    loops = [round(index * (num_loops - 1) / max(count - 1, 1)) for index in range(count)]
    return {
        "stage": block.stage,
        "block": block.block,
        "num_loops": num_loops,
        "loops": loops,
        **{name: [_json_number(values[loop]) for loop in loops] for name, values in block.values.items()},
        "gradient_agreement": _json_number(block.gradient_agreement),
        "coefficients": {name: _json_number(value) for name, value in block.coefficients.items()},
    }


def _json_number(value: float) -> float | None:
    """Four digits, or None for what JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
