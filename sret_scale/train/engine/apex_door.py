"""The one door to NVIDIA apex: its fused update kernels, where the right apex is there.

The project called `apex` on PyPI is another one, and NVIDIA's may be built without its kernels. So what counts is what
is exported: `apex.multi_tensor_apply.multi_tensor_applier`, available, and the kernels in `amp_C`, the extension that
only NVIDIA's build makes. Anything else is passed over, and torch's own kernels compute the same update.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = ("multi_tensor_adam", "multi_tensor_lamb")


@dataclass(frozen=True)
class ApexKernels:
    """Fused updates on CUDA tensors: lists of (values, gradients, exp_avgs, exp_avg_sqs), their counts of updates.

    Not its class FusedAdam, which counts updates once a group and has a state of its own.
    """

    applier: Callable[..., object]
    multi_tensor_adam: object
    multi_tensor_lamb: object

    def adamw(self, lists: Sequence[list[Tensor]], counts: Sequence[int], group: Mapping[str, Any]) -> None:
        """AdamW on every tensor of `lists`, in place."""
        for count, chosen in _by_count(lists, counts):
            values, *others = chosen
            gradients, exp_avgs, exp_avg_sqs = others
            is_decoupled, is_corrected = 1, 1
            self.applier(
                self.multi_tensor_adam,
                torch.zeros(1, dtype=torch.int32, device=values[0].device),
                [gradients, values, exp_avgs, exp_avg_sqs],
                *(group["lr"], *group["betas"], group["eps"], count),
                *(is_decoupled, is_corrected, group["weight_decay"]),
            )

    def lamb(self, lists: Sequence[list[Tensor]], counts: Sequence[int], group: Mapping[str, Any]) -> None:
        """LAMB on every tensor of `lists`, in place; the gradients become the updates."""
        for count, chosen in _by_count(lists, counts):
            values, gradients, exp_avgs, exp_avg_sqs = chosen
            is_corrected, is_averaged, is_decoupled, is_ratio_everywhere = 1, 1, 1, True
            # A norm of 0 against a bound of 1: the engine has clipped already.
            grad_norm, max_grad_norm = torch.zeros(1, device=values[0].device), 1.0
            self.applier(
                self.multi_tensor_lamb,
                torch.zeros(1, dtype=torch.int32, device=values[0].device),
                [gradients, values, exp_avgs, exp_avg_sqs],
                *(group["lr"], *group["betas"], group["eps"], count),
                *(is_corrected, group["weight_decay"], is_averaged, is_decoupled),
                *(grad_norm, max_grad_norm, is_ratio_everywhere),
            )


def _by_count(lists: Sequence[list[Tensor]], counts: Sequence[int]) -> list[tuple[int, list[list[Tensor]]]]:
    """The lists of the tensors that have had the same number of updates: a kernel takes one number."""
    chosen = [(count, [index for index, other in enumerate(counts) if other == count]) for count in sorted(set(counts))]
    return [(count, [[values[index] for index in indices] for values in lists]) for count, indices in chosen]


def find_apex() -> ApexKernels | None:
    """The kernels of NVIDIA apex; None where there is no apex, another one, or one without kernels."""
    try:
        applier: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        extension: ModuleType = importlib.import_module("amp_C")
        kernels = [getattr(extension, name) for name in KERNELS]
    except (ImportError, AttributeError):
        return None
    return ApexKernels(applier, *kernels) if getattr(applier, "available", False) else None


def choose_kernels(device: torch.device) -> tuple[ApexKernels | None, str]:
    """(what updates the parameters on `device` besides torch, if anything; a line that says what it is).

    On other devices than CUDA nothing is looked for, and nothing of that name is imported.
    """
    if device.type != "cuda":
        return None, f"optimizer: torch, on {device.type}"
    kernels = find_apex()
    return kernels, f"optimizer: fused kernels of {'NVIDIA apex' if kernels else 'torch'}"
