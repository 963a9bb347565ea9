"""The one door to DeepSpeed: builds its engine around a model, and steps it.

DeepSpeed computes (ZeRO, precision, accumulation, communication); everything else here keeps its measured traps away
from the training loop. State goes in and out by `whole_state`.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from sret_scale.config.ds_config import is_offloaded, precision_of, zero_stage_of
from sret_scale.config.precision import LossScale
from sret_scale.train.distributed import (
    Ranks,
    join_ranks,
    owners_of_buffers,
    ranks_from_environment,
    sum_over_ranks,
)
from sret_scale.train.engine import deepspeed_internals
from sret_scale.train.engine.clip import GradientNorms, clip_factors, measure, scale_gradients
from sret_scale.train.engine.optimizer import Optimizer, Rule
from sret_scale.train.engine.whole_state import WholeState
from sret_scale.train.engine.zero_layout import layout_of, live_gradients

ZERO_0_BUCKET = 1_000_000
"""Values that ranks add up at once at ZeRO 0. DeepSpeed takes all: 35 ms in place of 20 for SReT-T on a CPU, where a
bucket that fits into a cache saves passes over memory."""


def start_communication(ranks: Ranks) -> None:
    """Join the job's process group: nccl on GPUs, gloo on CPU."""
    deepspeed_internals.build_no_operators()
    # DeepSpeed asks for it even of a world of one, which no launcher started.
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    deepspeed.utils.logger.setLevel(logging.WARNING)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    join_ranks(ranks, backend)
    # DeepSpeed finds the process group and uses it.
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


class Engine(WholeState):
    """A model under DeepSpeed.

    `model` is trained in place and keeps fp32 parameters. `ds_config` is a dict of ds_configs/; the batch is added
    here, because it belongs to the run and not to the way of computing.

    A parameter that received no gradient in a whole accumulation window, on any rank, stays as it is: values, moments
    and count of updates, at every ZeRO stage (`last_norms.unused` names them). So whoever drops parts of the model for
    a step only has to leave them out of the forward pass, alike on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ds_config: Mapping[str, Any],
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        z3_leaf_modules: tuple[type[nn.Module], ...] = (),
    ) -> None:
        self.zero_stage = zero_stage_of(ds_config)
        self.model = model
        self.last_norms = GradientNorms(by_class={"none": math.nan}, unused=frozenset())
        """Of the last accumulation window, before clipping."""
        self.loss_scale = LossScale() if precision_of(ds_config) == "fp16" else None
        self.has_overflowed = False
        """True where the last update was left out only because the loss scale was too large."""
        self._client_optimizer = optimizer
        self._is_offloaded = is_offloaded(ds_config)
        self._clip_norm = float(ds_config["gradient_clipping"])
        ranks = ranks_from_environment()
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._device = next(model.parameters()).device
        if self.zero_stage == 3 and z3_leaf_modules:
            # A stage's recomputation is one autograd function: its parameters must be gathered as one. Not the stem's:
            # as images have no gradient, they would be given back before their own gradients are computed.
            set_z3_leaf_modules(model, list(z3_leaf_modules))
        deepspeed_internals.take_under_zero(Optimizer)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                **ds_config,
                **self._without_clipping(ds_config),
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": grad_accum_steps,
            },
        )
        if self.loss_scale:
            deepspeed_internals.leave_loss_scaling(self._engine, self._optimizer, self.zero_stage)
        if self.zero_stage == 0:
            # Where it reduces by itself, the size of its buckets is fixed.
            deepspeed_internals.leave_reduction(self._engine)
        # Found once: every step asks for them, and a walk through all layers of SReT-T takes half a millisecond.
        self._parameters = dict(model.named_parameters())
        self._owners_of_buffers = owners_of_buffers(model)
        names = {value: name for name, value in self._parameters.items()}
        optimizer.layout = layout_of(self.zero_stage, self._optimizer, names, rank=self._rank)
        optimizer.is_cut = self.zero_stage > 0
        if optimizer.is_cut:
            optimizer.sum_over_ranks = lambda values: sum_over_ranks(values.to(self._device)).to(values.device)
        self._rule_of: dict[str, Rule] = {name: group["rule"] for group in self.param_groups for name in group["names"]}
        self._used: set[str] = set()
        # Not by zeros: a gradient behind a layer that starts at 0 is zero, and DeepSpeed fills zeros in for the others.
        for name, parameter in self._trained_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))  # type: ignore[no-untyped-call]

    def _without_clipping(self, ds_config: Mapping[str, Any]) -> dict[str, Any]:
        """Overrides that leave norms and clipping to us: DeepSpeed knows one norm, of all parameters."""
        changed: dict[str, Any] = {"gradient_clipping": 0.0}
        if self.zero_stage in (1, 2) and not self._is_offloaded:
            changed["zero_optimization"] = {**ds_config["zero_optimization"], "compute_grad_norm": False}
        return changed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, under the precision of the ds_config."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._engine.backward(loss * self.loss_scale.value if self.loss_scale else loss)

    def step(self, *, is_rejected: bool = False) -> bool:
        """Count one micro-step; at the end of an accumulation window clip and update. All ranks must call it.

        An update with a gradient that is not finite, or that the caller rejects (on all ranks), is left out: weights,
        moments and counts stay as they are, bit for bit. False where that happened.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        if self.zero_stage == 0 and self._world_size > 1:
            deepspeed_internals.add_up(self._engine, self._whole_gradients(), ZERO_0_BUCKET)
        optimizer = self._client_optimizer
        scale = self.loss_scale.value if self.loss_scale else 1.0
        if self._is_offloaded and self._device.type == "cuda":
            # DeepSpeed copies gradients to the host beside the computation.
            torch.cuda.synchronize()
        gradients = live_gradients(self.zero_stage, self._optimizer, optimizer.layout, self._is_offloaded)
        self.last_norms = measure(
            gradients,
            optimizer.layout,
            self.param_groups,
            used=self._used,
            num_copies=1 if self.zero_stage else self._world_size,
            loss_scale=scale,
            device=self._device,
        )
        is_updated = self.last_norms.is_finite and not is_rejected
        if is_updated:
            factors = clip_factors(self.last_norms, self.param_groups, common_bound=self._clip_norm)
            unscaled = {kind: factor / scale for kind, factor in factors.items()}
            scale_gradients(gradients, optimizer.layout, self.param_groups, unscaled)
        with optimizer.holding(self.last_norms.unused, everything=not is_updated):
            self._engine.step()
        self._used.clear()
        self.has_overflowed = scale > 1.0 and not is_rejected and not is_updated
        if self.loss_scale and not is_rejected:
            self.loss_scale.update(is_updated)
        return is_updated

    def _whole_gradients(self) -> list[Tensor]:
        """Those of all trained parameters, zeros where this rank has none: ranks must add up equally many."""
        parameters = [parameter for _, parameter in self._trained_parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [cast(Tensor, parameter.grad) for parameter in parameters]

    def grad_norm(self) -> float:
        """L2 norm of the last window's gradient over all parameters, before clipping."""
        return self.last_norms.total

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, to set rates in."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups


def shard_frozen(
    module: nn.Module, device: torch.device, *, max_live_parameters: int = 100_000_000
) -> Callable[[Tensor], Tensor]:
    """A frozen network whose weights are cut over the ranks (ZeRO 3 without optimiser), as a function of its input.

    A layer's weights are gathered for its call and dropped again, at most `max_live_parameters` ahead of their use.
    All ranks must call it equally often. Give the network on the CPU: each rank moves only its fragment to the device.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": max_live_parameters,
            "stage3_prefetch_bucket_size": max_live_parameters // 4,
            # Norms and other small tensors stay whole: gathering them costs more than they weigh.
            "stage3_param_persistence_threshold": 10_000,
        },
    }
    if any(value.dtype == torch.bfloat16 for value in module.parameters()):
        # Without its own, DeepSpeed's engine would switch the caller's autocast off, and fp32 images meet bf16 weights.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    for layer in module.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(device))
        for value in layer.parameters(recurse=False):
            value.data = value.data.contiguous()  # fragments are cut from flat memory
    # One by one: `initialize` alone would need all weights on the device at once.
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return cast(Callable[[Tensor], Tensor], engine)
