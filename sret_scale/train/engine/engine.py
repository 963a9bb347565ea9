"""The one door to DeepSpeed: builds its engine around a model and moves whole, fp32 state in and out of it.

DeepSpeed computes (ZeRO, precision, accumulation, clipping, communication); everything else here keeps its measured
traps (architecture page, section 7) away from the training loop.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from sret_scale.config.ds_config import is_offloaded, precision_of, zero_stage_of
from sret_scale.config.precision import LossScale
from sret_scale.train.distributed import (
    Ranks,
    join_ranks,
    owners_of_buffers,
    ranks_from_environment,
    sum_over_ranks,
    whole_from_parts,
)
from sret_scale.train.engine import deepspeed_internals
from sret_scale.train.engine.clip import GradientNorms, clip_factors, measure, scale_gradients
from sret_scale.train.engine.optimizer import MOMENTS, Optimizer, Rule
from sret_scale.train.engine.snapshot import Field, Piece
from sret_scale.train.engine.zero_layout import gradient_chunks, layout_of

ADAM_MOMENTS = MOMENTS["adamw"]
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


class Engine:
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
            # A stage's recomputation is one autograd function: its parameters must be gathered as one.
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
        chunks = gradient_chunks(self.zero_stage, self._optimizer, optimizer.layout, self._is_offloaded)
        self.last_norms = measure(
            chunks,
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
            scale_gradients(chunks, optimizer.layout, self.param_groups, unscaled)
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
    def missed_updates(self) -> dict[str, int]:
        """How many updates left a parameter alone because it took no part, where there were any: part of the state."""
        return self._client_optimizer.missed

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, to set rates in."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def local_weights(self) -> dict[str, Tensor]:
        """The live tensors that this rank holds of every parameter and buffer by name: whole ones, at ZeRO 3 its parts.

        Parameters are fp32 at every stage, so these are the bits that the optimiser's own copy has.
        """
        parts = {name: deepspeed_internals.stage_3_part(value) for name, value in self._parameters.items()}
        return {
            name: (value if parts[name] is None else cast(Tensor, parts[name])).detach()
            for name, value in self._parameters.items()
        } | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        """The live buffers that belong to the model's state by name: whole ones at every stage."""
        return {name: layer.get_buffer(own) for name, (layer, own) in self._owners_of_buffers.items()}

    def weights(self) -> dict[str, Tensor]:
        """Whole copies of every parameter and buffer by name; all ranks must call it."""
        return self.assemble(self.local_weights())

    @torch.no_grad()
    def assemble(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, new ones, from tensors like those of `local_weights`; all ranks must call it."""
        shapes = {name: deepspeed_internals.stage_3_shape(value) for name, value in self._parameters.items()}
        return {name: _whole(value, shapes.get(name)) for name, value in local.items()}

    @torch.no_grad()
    def partition(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `assemble`: new tensors like those of `local_weights`."""
        return {
            name: self._own_part(self._parameters[name], value)
            if self.zero_stage == 3 and name in self._parameters
            else value.to(self._device, copy=True)
            for name, value in whole.items()
        }

    @torch.no_grad()
    def load_weights(self, whole: Mapping[str, Tensor]) -> None:
        """Set every parameter and buffer from whole tensors; `whole` has exactly the names of `local_weights`."""
        parts = self.partition(whole)
        for name, value in self.local_weights().items():
            value.copy_(parts[name])
        for name, parameter in self._trained_parameters():
            if self.zero_stage == 3:
                safe_set_local_fp32_param(parameter, parts[name])
            elif self.zero_stage:
                safe_set_full_fp32_param(parameter, parts[name])

    def pieces(self, set_name: str, local: Mapping[str, Tensor]) -> Iterator[Piece]:
        """What this rank has of tensors like those of `local_weights`, for a snapshot."""
        shapes = {name: deepspeed_internals.stage_3_shape(value) for name, value in self._parameters.items()}
        for name, value in local.items():
            shape = shapes.get(name)
            entry = Field(set_name=set_name, name=name, shape=shape or value.shape)
            yield Piece(values=value, is_part=shape is not None, fields=(entry,))

    def optimizer_pieces(self) -> Iterator[Piece]:
        """What this rank has of the moments, as `MOMENT.NAME`, and of `step`; nothing before the first step."""
        entries = self._optimizer_entries()
        steps = [entry["step"] for entry in entries.values() if "step" in entry]
        if not steps:
            return
        step = torch.as_tensor(steps[0], dtype=torch.float32).reshape(())
        yield Piece(values=step, is_part=False, fields=(Field(set_name="optimizer", name="step", shape=step.shape),))
        if self.zero_stage in (1, 2):
            yield from self._flat_moments(entries)
            return
        for name, parameter in self._trained_parameters():
            for moment in self._moments(name):
                if self.zero_stage == 3:
                    values = safe_get_local_optimizer_state(parameter, moment)
                else:
                    values = entries[parameter][moment]
                cut = deepspeed_internals.stage_3_shape(parameter)
                shape = parameter.shape if cut is None else cut
                entry = Field(set_name="optimizer", name=f"{moment}.{name}", shape=shape)
                yield Piece(values=values, is_part=self.zero_stage == 3, fields=(entry,))

    def _flat_moments(self, entries: Mapping[Any, Mapping[str, Tensor]]) -> Iterator[Piece]:
        # ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole into equal parts.
        names = {parameter: name for name, parameter in self._trained_parameters()}
        owners = deepspeed_internals.flat_weights(self._optimizer, self.zero_stage)
        for owner, group in zip(owners, deepspeed_internals.places(self._optimizer), strict=True):
            for moment in ADAM_MOMENTS:
                fields = tuple(
                    Field(set_name="optimizer", name=f"{moment}.{names[value]}", shape=value.shape, start=start)
                    for value, start in group
                )
                yield Piece(values=entries[owner][moment], is_part=True, fields=fields)

    @torch.no_grad()
    def load_optimizer_state(self, state: Mapping[str, Tensor], missed_updates: Mapping[str, int]) -> None:
        """Set moments and step from the whole tensors of `optimizer_pieces`, at any world size and stage.

        Raises ValueError where they are those of another update rule.
        """
        self._client_optimizer.missed = dict(missed_updates)
        if not state:
            return
        needed = {f"{moment}.{name}" for name, _ in self._trained_parameters() for moment in self._moments(name)}
        if missing := sorted(needed - set(state)):
            raise ValueError(
                f"the optimizer state lacks {missing[0]} (and {len(missing) - 1} more): it was made by another "
                "optim.optimizer; continue with that one, or start a run with train.initial_weights"
            )
        self._create_optimizer_entries(state["step"])
        if self.zero_stage in (1, 2):
            deepspeed_internals.link_moments(self._optimizer)
        for name, parameter in self._trained_parameters():
            for moment in self._moments(name):
                value = state[f"{moment}.{name}"].to(parameter.device)
                if self.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), moment)
                elif self.zero_stage:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    self._client_optimizer.state[parameter][moment].copy_(value)

    def _moments(self, name: str) -> tuple[str, ...]:
        return MOMENTS[self._rule_of[name]]

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._parameters.items() if parameter.requires_grad)

    def _optimizer_entries(self) -> dict[Any, dict[str, Any]]:
        inner = self._optimizer.optimizer if self.zero_stage else self._client_optimizer
        entries: dict[Any, dict[str, Any]] = inner.state
        return entries

    def _create_optimizer_entries(self, step: Tensor) -> None:
        """Zero moments at `step`, shaped as DeepSpeed keeps them: it makes them only in the first update."""
        entries = self._optimizer_entries()
        for owner, parts in self._client_optimizer.layout.items():
            moments = ADAM_MOMENTS if self.zero_stage else self._moments(parts[0].name)
            entries[owner] = {"step": step.clone(), **{moment: torch.zeros_like(owner) for moment in moments}}

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's flat ZeRO-3 part of `value`, zero-padded as DeepSpeed pads it.

        DeepSpeed's own setter of whole values fails where the ranks do not divide the size.
        """
        part = cast(Tensor, deepspeed_internals.stage_3_part(parameter))
        length = part.numel()
        start = self._rank * length
        own = value.to(part.device).flatten()[start : start + length]
        return nn.functional.pad(own, (0, length - own.numel()))


def _whole(value: Tensor, shape: torch.Size | None) -> Tensor:
    """A copy of `value`; with a `shape`, ZeRO-3 parts of all ranks put together to it."""
    if shape is None:
        return value.clone()
    return whole_from_parts(value)[: shape.numel()].view(shape)


def shard_frozen(
    module: nn.Module, device: torch.device, *, max_live_parameters: int = 100_000_000
) -> Callable[[Tensor], Tensor]:
    """A frozen network whose weights are cut over the ranks (ZeRO 3 without optimiser), as a function of its input.

    A layer's weights are gathered for its call and dropped again, at most `max_live_parameters` ahead of their use.
    All ranks must call it equally often. Give the network on the CPU: each rank moves only its part to the device.
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
            value.data = value.data.contiguous()  # parts are cut from flat memory
    # One by one: `initialize` alone would need all weights on the device at once.
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return cast(Callable[[Tensor], Tensor], engine)
