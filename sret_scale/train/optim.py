"""Parameter groups, the learning-rate schedule and the moving average of the weights; all of them count images."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sret_scale.config.run_config import ClassConfig, OptimConfig, ParameterClass, RunConfig
from sret_scale.model import ParameterTag
from sret_scale.model.stack import ParameterKind
from sret_scale.train.engine.optimizer import Optimizer, Rule
from sret_scale.train.engine.zero_layout import layout_of

CLASS_OF_KIND: dict[ParameterKind, ParameterClass] = {
    "tied": "tied",
    "projection": "projection",
    "conditioning": "projection",
    "residual": "residual",
    "stem": "stem_head",
    "pool": "stem_head",
    "position": "stem_head",
    "norm": "stem_head",
    "head": "stem_head",
}

LINEAR_BATCH_LIMIT = 2048


def peak_rate(config: OptimConfig, global_batch_size: int) -> float:
    """The peak learning rate at this batch, by the rule `batch_scaling`.

    `linear`: rate * batch / reference; `sqrt`: its root; `linear_then_sqrt`: linear up to a batch of 2048, from where
    the rate grows with the root of the batch, without a jump.
    """
    ratio = global_batch_size / config.reference_batch_size
    linear = min(global_batch_size, LINEAR_BATCH_LIMIT) / config.reference_batch_size
    beyond = math.sqrt(max(1.0, global_batch_size / LINEAR_BATCH_LIMIT))
    factors = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio), "linear_then_sqrt": linear * beyond}
    return config.learning_rate * factors[config.batch_scaling]


def schedule_factor(images: int, *, total_images: int, warmup_images: int, final_ratio: float) -> float:
    """The share of the peak rate for an update made when `images` were seen before it.

    Linear from 0 over the warm-up, then a cosine to `final_ratio` at `total_images`
    (Loshchilov and Hutter, arXiv 1608.03983, equation 5 without restarts).
    """
    if images < warmup_images:
        return images / warmup_images
    progress = (images - warmup_images) / max(1, total_images - warmup_images)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def learning_rate(config: RunConfig, images: int) -> float:
    """The rate of the step that begins when so many images have been seen, before the ratios of parameter classes."""
    optim = config.optim
    return peak_rate(optim, config.train.global_batch_size) * schedule_factor(
        images,
        total_images=config.train.total_images,
        warmup_images=optim.warmup_images,
        final_ratio=optim.final_rate_ratio,
    )


def build_optimizer(model: nn.Module, tags: Mapping[str, ParameterTag], config: OptimConfig) -> Optimizer:
    """An optimiser with one parameter group for each (class, decay, rate, rule) of `tags`, in a fixed order.

    Each group has `rate_ratio`, its rate relative to the run's (see `set_rates`), `kind`, the class, and its
    `clip_norm`.
    """
    groups: dict[tuple[ParameterClass, float, float, Rule], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = _group_of(tags[name], parameter, config)
            groups.setdefault(key, {})[name] = parameter
    optimizer = Optimizer(
        [
            {
                "params": list(members.values()),
                "names": list(members),
                "kind": kind,
                "rule": rule,
                "weight_decay": decay,
                "rate_ratio": ratio,
                "eps": getattr(config, kind).eps or config.eps,
                "clip_norm": getattr(config, kind).clip_norm,
            }
            for (kind, decay, ratio, rule), members in sorted(groups.items())
        ],
        betas=(config.beta1, config.beta2),
    )
    # What an engine replaces where it cuts parameters.
    optimizer.layout = layout_of(0, optimizer, {value: name for name, value in model.named_parameters()}, rank=0)
    set_rates(optimizer.param_groups, config.learning_rate)
    return optimizer


def _group_of(
    tag: ParameterTag, parameter: nn.Parameter, config: OptimConfig
) -> tuple[ParameterClass, float, float, Rule]:
    kind = CLASS_OF_KIND[tag.kind]
    chosen: ClassConfig = getattr(config, kind)
    decay = 0.0
    if tag.decay:
        decay = config.weight_decay if chosen.weight_decay is None else chosen.weight_decay
    depth = tag.num_layers - 1 - tag.layer
    ratio = tag.lr_scale * chosen.rate_ratio * config.layer_decay**depth
    rule: Rule = config.optimizer
    if rule == "muon" and not (kind == "tied" and parameter.ndim == 2):
        rule = "adamw"
    return kind, decay, ratio, rule


def check_optimizer(config: OptimConfig, zero_stage: int) -> None:
    """Raise ValueError where ZeRO's cutting of parameters makes an update rule impossible."""
    if config.optimizer == "muon" and zero_stage:
        raise ValueError(
            f"optim.optimizer=muon does not work at ZeRO stage {zero_stage}: it needs whole matrices, and there a rank "
            "has flat parts of them; use engine.ds_config=zero0, or adamw or lamb"
        )


def set_rates(param_groups: list[dict[str, object]], rate: float) -> None:
    """Give every group `rate` times its own ratio."""
    for group in param_groups:
        group["lr"] = rate * float(group["rate_ratio"])  # type: ignore[arg-type]  # torch types a group's values as object


class WeightAverage:
    """An exponential moving average of named tensors: parameters and floating-point buffers.

    The weight of the newest values is the larger of 1 - exp(-batch / horizon), which forgets to 1/e over the horizon at
    any batch, and 1 / updates: a plain mean while the run is younger than its horizon, which drops the initial weights.
    """

    def __init__(self, values: Mapping[str, Tensor], horizon_images: int) -> None:
        self.horizon_images = horizon_images
        self.num_updates = 0
        self.averages = {name: value.detach().clone() for name, value in values.items()}
        self.statistics: dict[str, Tensor] = {}
        """BatchNorm's statistics measured for the averages as they are now, whole; empty where nobody measured."""

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], batch_images: int) -> None:
        """Take in the values after an update made with `batch_images` images."""
        self.num_updates += 1
        self.statistics = {}
        newest = max(-math.expm1(-batch_images / self.horizon_images), 1 / self.num_updates)
        names = [name for name, average in self.averages.items() if average.is_floating_point()]
        torch._foreach_lerp_([self.averages[name] for name in names], [values[name] for name in names], newest)
        for name, average in self.averages.items():
            if not average.is_floating_point():
                average.copy_(values[name])
