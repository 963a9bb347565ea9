"""Every name of DeepSpeed 0.19.8 that we use and its documentation does not promise, one function each.

An upgrade of DeepSpeed is this file and one list of failures: tests/train/test_deepspeed_internals.py tests each name.
"Optimizer" is its ZeRO optimizer below; at stage 0 there is none. A flat tensor holds the parameters of a group end to
end, cut over the ranks.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn


def build_no_operators() -> None:
    """Before `init_distributed`: keep DeepSpeed from building and probing its compiled operators."""
    import deepspeed  # here, as below: it costs seconds, and whoever lays out gradients by hand does without it

    # It builds a shared-memory all-reduce on CPU at start. Only its inference path calls it, the build takes a minute
    # and a C++ compiler, and a killed build leaves a lock that hangs every later start. Nothing else is asked of this
    # table, which is set as a whole because DeepSpeed would fill it by compiling small programs for 0.8 s.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def take_under_zero(kind: type[torch.optim.Optimizer]) -> None:
    """Let ZeRO 1 to 3 wrap an optimiser of this class without a warning."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        # It warns of what it does not know; tests/train/test_train_update.py holds ours at every stage.
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def leave_loss_scaling(engine: Any, optimizer: Any, zero_stage: int) -> None:
    """Keep fp16 autocast without DeepSpeed's own loss scale, which runs once per group and rank."""
    engine.torch_autocast_z0_gradscaler = None
    if zero_stage:
        optimizer.torch_autocast_gradscaler = None


def leave_reduction(engine: Any) -> None:
    """At stage 0: the engine's backward pass adds nothing up over the ranks; `add_up` does."""
    engine.enable_backward_allreduce = False


def add_up(engine: Any, gradients: list[Tensor], bucket_values: int) -> None:
    """Average gradients over the ranks in place, so many values at once. All ranks must give equally many."""
    engine.buffered_allreduce_fallback(gradients, elements_per_buffer=bucket_values)


def flat_weights(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """The fp32 tensors that a rank's optimiser updates at stages 1 to 3, one a group."""
    return list(
        optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups
    )


def listed_parameters(optimizer: Any, zero_stage: int) -> list[list[nn.Parameter]]:
    """The parameters of each flat tensor; at stage 3 in the order in which they lie."""
    return [list(group) for group in (optimizer.fp16_groups if zero_stage == 3 else optimizer.bit16_groups)]


def places(optimizer: Any) -> list[list[tuple[nn.Parameter, int]]]:
    """At stages 1 and 2: each group's parameters as they lie in the fragments of all ranks, and where each begins."""
    groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
    return [list(zip(parameters, starts, strict=True)) for parameters, starts in groups]


def own_fragment(parameter: nn.Parameter) -> tuple[int, int] | None:
    """At stages 1 and 2: (start, length) in this rank's flat tensor, None where the parameter lies on other ranks."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def averaged_gradients(optimizer: Any, group: int) -> list[Tensor]:
    """At stages 1 to 3, after the last backward pass: the live gradient of a flat tensor, as tensors end to end."""
    return list(optimizer.averaged_gradients[group])


def link_moments(optimizer: Any) -> None:
    """At stages 1 and 2: let `safe_get_full_optimizer_state` and its kin find the moments of every group."""
    # DeepSpeed links moments to parameters after the first group's first update, when the other groups have none yet,
    # and then never again.
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def stage_3_fragment(parameter: nn.Parameter) -> Tensor | None:
    """At stage 3: this rank's flat fragment, padded to equal length on all ranks; None at other stages."""
    return cast(Tensor | None, getattr(parameter, "ds_tensor", None))


def stage_3_shape(parameter: nn.Parameter) -> torch.Size | None:
    """At stage 3: the shape of the whole parameter; None at other stages."""
    return cast(torch.Size | None, getattr(parameter, "ds_shape", None))
