"""The update rules of the product, plainly: one process, one tensor at a time, with torch's own optimisers.

What the toy trains to under every ZeRO stage has to come out of this too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.config.run_config import ClassConfig
from sret_scale.train.optim import CLASS_OF_KIND
from tests.train.update_toy import ACCUMULATION, BASE, COMMON_BOUND, FP16_STEPS, PLAN, WORLD, Toy, data, rate_at


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2), a tensor at a time."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = 0.9 * state.get("m", torch.zeros_like(x)) + 0.1 * x.grad
                v = state["v"] = 0.999 * state.get("v", torch.zeros_like(x)) + 0.001 * x.grad**2
                r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + group["eps"])
                u = r + group["weight_decay"] * x
                ratio = x.norm() / u.norm() if x.norm() > 0 and u.norm() > 0 else 1.0
                x -= group["lr"] * ratio * u


def optimizers(model: Toy, rule: str) -> list[torch.optim.Optimizer]:
    """torch's optimisers over groups of one parameter each, with `ratio` and `kind`."""
    rest: list[dict[str, Any]] = []
    matrices: list[dict[str, Any]] = []
    for name, tag in model.tags().items():
        kind = CLASS_OF_KIND[tag.kind]
        chosen: ClassConfig = getattr(BASE, kind)
        decay = BASE.weight_decay if chosen.weight_decay is None else chosen.weight_decay
        group = {
            "params": [model.get_parameter(name)],
            "kind": kind,
            "ratio": chosen.rate_ratio * BASE.layer_decay ** (2 - tag.layer),
            "weight_decay": decay if tag.decay else 0.0,
        }
        if rule == "muon" and kind == "tied" and tag.decay:
            matrices.append(group)
        else:
            rest.append({**group, "eps": chosen.eps or BASE.eps})
    if rule == "lamb":
        return [Lamb(rest)]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.999))]
    return [*found, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")] if matrices else found


def clip(groups: list[dict[str, Any]]) -> None:
    """Each class with a bound by its own norm, the others by their common one."""
    by_bound: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group in groups:
        bound = getattr(BASE, str(group["kind"])).clip_norm
        key = ("common", COMMON_BOUND) if bound is None else (str(group["kind"]), bound)
        by_bound.setdefault(key, []).extend(group["params"])
    for (_, bound), parameters in by_bound.items():
        nn.utils.clip_grad_norm_(parameters, bound)


def trained_fp32(num_left_out: int) -> dict[str, Tensor]:
    """The toy's parameters after the steps of the fp16 test, in fp32, the first ones left out."""
    model = Toy()
    optimizer = torch.optim.AdamW(
        [{"params": [value], "weight_decay": 0.05 if value.ndim > 1 else 0.0} for value in model.parameters()], lr=0.01
    )
    for step in range(num_left_out, FP16_STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            x, labels = data(0, step, rank)
            (F.cross_entropy(model(x, (0, 1)), labels) / WORLD).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def trained(rule: str) -> dict[str, Tensor]:
    """The toy's parameters after the plan."""
    model = Toy()
    rules = optimizers(model, rule)
    groups = [group for optimizer in rules for group in optimizer.param_groups]
    for step, planned in enumerate(PLAN):
        model.zero_grad(set_to_none=True)
        for group in groups:
            group["lr"] = rate_at(step) * group["ratio"]
        for micro_step in range(ACCUMULATION):
            for rank in range(WORLD):
                x, labels = data(step, micro_step, rank)
                (F.cross_entropy(model(x, planned.projections), labels) / (WORLD * ACCUMULATION)).backward()
        if not planned.is_skipped:
            clip(groups)
            for optimizer in rules:
                optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}
