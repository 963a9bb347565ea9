"""Runs as points and lines of a depth curve: seeds of one configuration make a point, depths of one kind a line.

A kind is what is left of the configuration without depth, seed and, where a matching rule moved them with the depth,
images, widths or batches. Of a sweep over learning rates each depth keeps its best rate.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sret_scale.lab.report.compare import decisive, seed_groups
from sret_scale.lab.report.run_record import RunRecord
from sret_scale.lab.report.summary import Summary

RATE = "optim.learning_rate"
RATES_OF_A_SWEEP = 3
_DEPTH = re.compile(r"model\.stages\.\d+\.num_(loops|blocks)")
# What equal_flops, equal_parameters and equal_memory change with the depth.
_MATCHED = re.compile(
    r"train\.(total_images|eval_interval_images|checkpoint_interval_images|micro_batch_size)"
    r"|optim\.(warmup_images|ema_horizon_images)|model\.stages\.\d+\.(width|mlp_ratio)|memory\.\w+"
)
_STAGE = re.compile(r"model\.stages\.\d+\.")

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one configuration: their top-1 ratios, their last evaluation losses, and what each cost (means)."""

    runs: tuple[str, ...]
    fields: Mapping[str, str]
    top1: tuple[float, ...]
    losses: tuple[float, ...]
    costs: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean top-1 of the seeds."""
        return float(np.mean(self.top1))

    @property
    def loss(self) -> float:
        """Mean evaluation loss of the seeds; NaN without one."""
        return float(np.mean(self.losses)) if self.losses else float("nan")

    @property
    def depth(self) -> float:
        """Block applications."""
        return self.costs["depth_applications"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one kind by rising depth; `label` says how the kind differs from the other lines."""

    label: str
    points: tuple[Point, ...]


def gather(
    runs: Sequence[RunRecord], summaries: Sequence[Summary], costs: Mapping[str, Callable[[Summary], float]]
) -> list[Point]:
    """One point for each configuration that was evaluated, whatever its number of seeds."""
    points = []
    for group in seed_groups(runs):
        scored = [i for i in group if (top1 := summaries[i].top1) is not None and np.isfinite(top1)]
        if scored:
            losses = [runs[i].last("eval", "loss") for i in scored]
            points.append(
                Point(
                    runs=tuple(summaries[i].run for i in scored),
                    fields=decisive(runs[scored[0]].config),
                    top1=tuple(summaries[i].top1 or 0.0 for i in scored),
                    losses=tuple(loss for loss in losses if loss is not None and np.isfinite(loss)),
                    costs={name: float(np.mean([cost(summaries[i]) for i in scored])) for name, cost in costs.items()},
                )
            )
    return points


def lines_of(points: Sequence[Point]) -> list[Line]:
    """The points as lines, in the order of their first point; of a sweep over rates only the best of each depth."""
    points = _best_rates(points)
    kinds = _by_key(points, lambda point: _key(point, _DEPTH))
    # A depth with a configuration of its own was matched to the others.
    lone = [point for group in kinds.values() if len({point.depth for point in group}) == 1 for point in group]
    matched = _by_key(lone, lambda point: _key(point, _DEPTH, _MATCHED))
    groups = [group for group in kinds.values() if len({point.depth for point in group}) > 1] + list(matched.values())
    groups.sort(key=lambda group: min(points.index(point) for point in group))
    labels = _labels(groups)
    return [
        Line(label=label, points=tuple(sorted(group, key=lambda point: point.depth)))
        for label, group in zip(labels, groups, strict=True)
    ]


def rates_of(points: Sequence[Point]) -> list[tuple[Line, list[Point]]]:
    """For each kind but for its rate: a line of the best point at each depth, and all its points.

    Empty where nothing sweeps the rate.
    """
    groups = _by_key(points, lambda point: _key(point, _DEPTH, re.compile(re.escape(RATE))))
    swept = [group for group in groups.values() if len({p.fields.get(RATE) for p in group}) >= RATES_OF_A_SWEEP]
    labels = _labels(swept)
    lines = []
    for label, group in zip(labels, swept, strict=True):
        depths = _by_key(group, lambda point: _key(point, re.compile(re.escape(RATE)))).values()
        chosen = [max(points, key=lambda point: point.mean) for points in depths if len(points) >= RATES_OF_A_SWEEP]
        best = tuple(sorted(chosen, key=lambda point: point.depth))
        lines.append((Line(label=label, points=best), group))
    return lines


def _best_rates(points: Sequence[Point]) -> list[Point]:
    """The points; of at least RATES_OF_A_SWEEP that differ in nothing but the rate only the best, marked as such."""
    kept = []
    for group in _by_key(points, lambda point: _key(point, re.compile(re.escape(RATE)))).values():
        if len(group) < RATES_OF_A_SWEEP:
            kept += group
            continue
        best = max(group, key=lambda point: point.mean)
        # Depths may prefer different rates: what was chosen among several is no part of the kind.
        kept.append(replace(best, fields={**best.fields, RATE: f"best of {len(group)}"}))
    return kept


def _by_key(points: Sequence[Point], key: Callable[[Point], Key]) -> dict[Key, list[Point]]:
    groups: dict[Key, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _key(point: Point, *left_out: re.Pattern[str]) -> Key:
    return tuple(
        (key, value)
        for key, value in point.fields.items()
        if key != "train.seed" and not any(pattern.fullmatch(key) for pattern in left_out)
    )


def follows(key: str) -> bool:
    """Whether a field moves with the images or the depth by a matching rule, such as the warm-up: others tell."""
    return bool(_MATCHED.fullmatch(key)) and key != "train.total_images" and not key.startswith("memory.")


def _labels(groups: Sequence[Sequence[Point]]) -> list[str]:
    """What is special about each group: fields that are equal inside it and not in all groups, stages taken together.

    A group in which images or widths move with the depth is called by that.
    """
    common: list[dict[str, str]] = []
    for group in groups:
        shared = dict(group[0].fields)
        for point in group[1:]:
            shared = {key: value for key, value in shared.items() if point.fields.get(key) == value}
        common.append(shared)
    labels = []
    for group, shared in zip(groups, common, strict=True):
        parts: dict[str, None] = {}
        for key, value in shared.items():
            is_own = not _DEPTH.fullmatch(key) and key != "train.seed" and not follows(key)
            others = [other for other in common if other is not shared]
            if is_own and any(key in other and other[key] != value for other in others):
                parts[f"{_STAGE.sub('', key).rpartition('.')[2]} {value}"] = None
        if len(groups) > 1 and len({point.depth for point in group}) > 1:
            flops = {point.fields.get("train.total_images") for point in group}
            widths = {point.fields.get("model.stages.0.width") for point in group}
            if len(flops) > 1:
                parts["equal FLOPs"] = None
            if len(widths) > 1:
                parts["equal parameters"] = None
        labels.append(", ".join(parts) or ("" if len(groups) == 1 else "base"))
    return labels
