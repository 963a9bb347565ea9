"""What is wrong with the depth of a model, in plain sentences, from what a probe read off.

Thresholds are far from what healthy runs of the shipped recipes show (docs/depth.md), so that an alarm is worth a look.
"""

import math
from collections.abc import Collection, Sequence

from sret_scale.train.telemetry.depth_probe import BlockUses

LIMITS = {"fp16": 65504.0, "bf16": 3.39e38, "fp32": 3.40e38}
"""The largest number of each type that computes products."""

GROWTH = 1.05  # a loop: 130-fold over a hundred
TOTAL_GROWTH = 10.0  # twelve healthy loops grow 1.15-fold each, 4.7 in all
COLLAPSE_COSINE = 0.99
IDLE_STEP = 1e-4
DEAD_GRADIENT = 1e-6
SHARP_ENTROPY = 0.01
NEAR_LIMIT = 0.1


LASTING = ("collapse", "idle", "entropy")
"""Kinds that say something only if a second probe finds them again: tokens of an untrained model are often alike."""

Findings = dict[tuple[int, str], str]
"""(stage, kind) -> sentence."""


def alarms(found: Findings, before: Collection[tuple[int, str]]) -> Findings:
    """Those worth a look. before: what the probe before this one found."""
    return {key: sentence for key, sentence in found.items() if key[1] not in LASTING or key in before}


def findings(blocks: Sequence[BlockUses], schemes: Sequence[str], precision: str) -> Findings:
    """At most one sentence of each kind and stage. schemes: the branch scheme of every stage."""
    found: Findings = {}
    for block in blocks:
        for kind, sentence in _of_block(block, schemes[block.stage], precision):
            found.setdefault((block.stage, kind), f"stage {block.stage} {sentence}")
    return found


def _of_block(block: BlockUses, scheme: str, precision: str) -> list[tuple[str, str]]:
    values, found = block.values, []
    if not all(math.isfinite(value) for name in ("rms", "gradient_norm") for value in values[name]):
        return [
            ("finite", "has values that are not numbers: lower optim.learning_rate, or use branch scheme loop_aware")
        ]
    # A stream to which every loop adds as much, as from small embeddings, grows many-fold at first and then ever less.
    rms = values["rms"]
    growth = min(growth_per_loop(rms), growth_per_loop(rms[len(rms) // 2 :] if len(rms) > 3 else rms))
    total = growth ** (len(rms) - 1)
    if growth > GROWTH and total > TOTAL_GROWTH:
        found.append(("growth", f"grows {growth:.3g}-fold a loop: {_consequence(block, growth)}; {_advice(scheme)}"))
    elif max(values["max_abs"]) > NEAR_LIMIT * LIMITS[precision]:
        found.append(
            ("limit", f"reaches {max(values['max_abs']):.3g} of at most {LIMITS[precision]:.3g} in {precision}")
        )
    num_alike = sum(value > COLLAPSE_COSINE for value in values["token_cosine"])
    if num_alike == len(values["token_cosine"]):
        found.append(("collapse", "has collapsed: its tokens are all alike (cosine above 0.99) in every loop"))
    num_idle = _tail(value < IDLE_STEP for value in values["step_ratio"])
    if num_idle * 2 >= len(values["step_ratio"]) > 1:
        found.append(
            ("idle", f"does nothing in the last {num_idle} loops of a block (relative step below {IDLE_STEP:g}): "
             "fewer loops give the same")
        )  # fmt: skip
    largest = max(values["gradient_norm"])
    num_dead = sum(value < DEAD_GRADIENT * largest for value in values["gradient_norm"])
    if num_dead:
        found.append(
            (
                "gradient",
                f"has loops that hardly learn: {num_dead} of {len(values['rms'])} (gradient below 1e-6 of the largest)",
            )
        )
    if max((value for value in values["attention_entropy"] if value == value), default=1.0) < SHARP_ENTROPY:
        found.append(("entropy", "looks at single tokens in every loop (attention entropy below 0.01)"))
    return found


def growth_per_loop(rms: Sequence[float]) -> float:
    """The mean factor from one loop's RMS to the next (least squares of its logarithm over the loops); 1 for one."""
    number = len(rms)
    if number < 2 or not all(0 < value < math.inf for value in rms):
        return 1.0
    centre = (number - 1) / 2
    slope = sum((loop - centre) * math.log(value) for loop, value in enumerate(rms))
    return math.exp(slope / sum((loop - centre) ** 2 for loop in range(number)))


def _consequence(block: BlockUses, growth: float) -> str:
    """Where fp16 would end; beyond its loops, what is lost at the last one."""
    last = block.values["max_abs"][-1]
    overflow = len(block.values["rms"]) + math.log(LIMITS["fp16"] / last) / math.log(growth) if last > 0 else math.inf
    return f"expect fp16 overflow at loop {max(1, math.ceil(overflow))}"


def _advice(scheme: str) -> str:
    if scheme == "loop_aware":
        return "lower optim.learning_rate, or freeze the skip"
    return "try branch scheme loop_aware"


def _tail(flags: object) -> int:
    """How many of the last flags are true in a row."""
    count = 0
    for flag in reversed(list(flags)):  # type: ignore[call-overload]
        if not flag:
            break
        count += 1
    return count
