"""Whole, fp32 state in and out of an engine, whatever ZeRO has cut over the ranks: weights, buffers, moments."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from deepspeed.utils import (
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from sret_scale.train.distributed import whole_from_fragments
from sret_scale.train.engine import deepspeed_internals
from sret_scale.train.engine.optimizer import MOMENTS, Optimizer, Rule
from sret_scale.train.engine.snapshot import RankTensor, WholeTensor

ADAM_MOMENTS = MOMENTS["adamw"]


class WholeState:
    """What of `Engine` moves state; what it reads of the engine is declared here."""

    zero_stage: int
    _client_optimizer: Optimizer
    _optimizer: Any
    """DeepSpeed's: at ZeRO 1 to 3 around the client's."""
    _parameters: dict[str, nn.Parameter]
    _owners_of_buffers: dict[str, tuple[nn.Module, str]]
    _rule_of: dict[str, Rule]
    _rank: int
    _device: torch.device

    @property
    def missed_updates(self) -> dict[str, int]:
        """How many updates left a parameter alone because it took no part, where there were any: part of the state."""
        return self._client_optimizer.missed

    def local_weights(self) -> dict[str, Tensor]:
        """The live tensors that this rank has of every parameter and buffer by name: whole, at ZeRO 3 its fragments.

        Parameters are fp32 at every stage, so these are the bits that the optimiser's own copy has.
        """
        fragments = {name: deepspeed_internals.stage_3_fragment(value) for name, value in self._parameters.items()}
        return {
            name: (value if fragments[name] is None else cast(Tensor, fragments[name])).detach()
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
            name: self._own_fragment(self._parameters[name], value)
            if self.zero_stage == 3 and name in self._parameters
            else value.to(self._device, copy=True)
            for name, value in whole.items()
        }

    @torch.no_grad()
    def load_weights(self, whole: Mapping[str, Tensor]) -> None:
        """Set every parameter and buffer from whole tensors; `whole` has exactly the names of `local_weights`."""
        fragments = self.partition(whole)
        for name, value in self.local_weights().items():
            value.copy_(fragments[name])
        for name, parameter in self._trained_parameters():
            if self.zero_stage == 3:
                safe_set_local_fp32_param(parameter, fragments[name])
            elif self.zero_stage:
                safe_set_full_fp32_param(parameter, fragments[name])

    def rank_tensors(self, set_name: str, local: Mapping[str, Tensor]) -> Iterator[RankTensor]:
        """What this rank has of tensors like those of `local_weights`, for a snapshot."""
        shapes = {name: deepspeed_internals.stage_3_shape(value) for name, value in self._parameters.items()}
        for name, value in local.items():
            shape = shapes.get(name)
            entry = WholeTensor(set_name=set_name, name=name, shape=shape or value.shape)
            yield RankTensor(values=value, is_fragment=shape is not None, wholes=(entry,))

    def optimizer_tensors(self) -> Iterator[RankTensor]:
        """What this rank has of the moments, as `MOMENT.NAME`, and of `step`; nothing before the first step."""
        entries = self._optimizer_entries()
        steps = [entry["step"] for entry in entries.values() if "step" in entry]
        if not steps:
            return
        step = torch.as_tensor(steps[0], dtype=torch.float32).reshape(())
        yield RankTensor(
            values=step, is_fragment=False, wholes=(WholeTensor(set_name="optimizer", name="step", shape=step.shape),)
        )
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
                entry = WholeTensor(set_name="optimizer", name=f"{moment}.{name}", shape=shape)
                yield RankTensor(values=values, is_fragment=self.zero_stage == 3, wholes=(entry,))

    def _flat_moments(self, entries: Mapping[Any, Mapping[str, Tensor]]) -> Iterator[RankTensor]:
        # ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole into equal fragments.
        names = {parameter: name for name, parameter in self._trained_parameters()}
        owners = deepspeed_internals.flat_weights(self._optimizer, self.zero_stage)
        for owner, group in zip(owners, deepspeed_internals.places(self._optimizer), strict=True):
            for moment in ADAM_MOMENTS:
                wholes = tuple(
                    WholeTensor(set_name="optimizer", name=f"{moment}.{names[value]}", shape=value.shape, start=start)
                    for value, start in group
                )
                yield RankTensor(values=entries[owner][moment], is_fragment=True, wholes=wholes)

    @torch.no_grad()
    def load_optimizer_state(self, state: Mapping[str, Tensor], missed_updates: Mapping[str, int]) -> None:
        """Set moments and step from the whole tensors of `optimizer_tensors`, at any world size and stage.

        Raises ValueError where they are those of another update rule.
        """
        self._client_optimizer.missed = dict(missed_updates)
        if not state:
            return
        needed = {f"{moment}.{name}" for name, _ in self._trained_parameters() for moment in self._moments(name)}
        if missing := sorted({"step", *needed} - set(state)):
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
                cut = deepspeed_internals.stage_3_shape(parameter)
                shape = tuple(parameter.shape if cut is None else cut)
                if value.shape != shape:
                    raise ValueError(
                        f"optimizer state {moment}.{name}: expected {shape}, got {tuple(value.shape)}: the newest "
                        "checkpoint is damaged; delete it, and the run continues from the one before"
                    )
                if self.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, self._own_fragment(parameter, value), moment)
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
        for owner, fragments in self._client_optimizer.layout.items():
            moments = ADAM_MOMENTS if self.zero_stage else self._moments(fragments[0].name)
            entries[owner] = {"step": step.clone(), **{moment: torch.zeros_like(owner) for moment in moments}}

    def _own_fragment(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's flat ZeRO-3 fragment of `value`, zero-padded as DeepSpeed pads it.

        DeepSpeed's own setter of whole values fails where the ranks do not divide the size.
        """
        fragment = cast(Tensor, deepspeed_internals.stage_3_fragment(parameter))
        length = fragment.numel()
        start = self._rank * length
        own = value.to(fragment.device).flatten()[start : start + length]
        return nn.functional.pad(own, (0, length - own.numel()))


def _whole(value: Tensor, shape: torch.Size | None) -> Tensor:
    """A copy of `value`; with a `shape`, ZeRO-3 fragments of all ranks put together to it."""
    if shape is None:
        return value.clone()
    return whole_from_fragments(value)[: shape.numel()].view(shape)
