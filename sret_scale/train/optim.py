"""The optimiser, its schedule and the moving average of the weights; all of them count images."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sret_scale.model import ParameterTag
from sret_scale.train.config import OptimConfig


def peak_rate(config: OptimConfig, global_batch_size: int) -> float:
    """The peak learning rate at this batch: rate * batch / reference (`linear`), its root (`sqrt`), or the rate."""
    ratio = global_batch_size / config.reference_batch_size
    return config.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.batch_scaling]


def schedule_factor(images: int, *, total_images: int, warmup_images: int, final_ratio: float) -> float:
    """The share of the peak rate for an update made when `images` were seen before it.

    Linear from 0 over the warm-up, then a cosine to `final_ratio` at `total_images`
    (Loshchilov and Hutter, arXiv 1608.03983, equation 5 without restarts).
    """
    if images < warmup_images:
        return images / warmup_images
    progress = (images - warmup_images) / max(1, total_images - warmup_images)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: nn.Module, tags: Mapping[str, ParameterTag], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one parameter group for each (kind, decay, rate) of `tags`, in a fixed order.

    Each group has `rate_ratio`, its rate relative to the run's: see `set_rates`.
    """
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tag = tags[name]
            groups.setdefault((tag.kind, tag.decay, tag.lr_scale), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "kind": kind,
                "weight_decay": config.weight_decay if decay else 0.0,
                "rate_ratio": lr_scale * (config.residual_rate_ratio if kind == "residual" else 1.0),
            }
            for (kind, decay, lr_scale), parameters in sorted(groups.items())
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
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

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], batch_images: int) -> None:
        """Take in the values after an update made with `batch_images` images."""
        self.num_updates += 1
        newest = max(-math.expm1(-batch_images / self.horizon_images), 1 / self.num_updates)
        names = [name for name, average in self.averages.items() if average.is_floating_point()]
        torch._foreach_lerp_([self.averages[name] for name in names], [values[name] for name in names], newest)
        for name, average in self.averages.items():
            if not average.is_floating_point():
                average.copy_(values[name])
