"""Sends a few images through a model, one application at a time, forward and back, and reads off every use of a block.

The model's parameters, buffers, gradients and random state are left as they were. Shapes: B batch, N tokens, D width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sret_scale.config.precision import Precision, autocast
from sret_scale.model import Application, Noise, StackModel
from sret_scale.model.stage import chain_of, chains_run_by, context_of
from sret_scale.model.windows import HIDDEN
from sret_scale.train.telemetry.statistics import attention_entropy, rank_ratio, rms, token_cosine

FORWARD = ("rms", "branch_ratio", "step_ratio", "token_cosine", "rank_ratio", "attention_entropy", "max_abs")
BACKWARD = ("gradient_norm", "gradient_cosine")


@dataclass
class BlockUses:
    """What was read off each use of one block: a list of scalars by name, in the order of the loops."""

    stage: int
    block: int
    coefficients: dict[str, float]
    values: dict[str, list[float]] = field(default_factory=dict)
    gradient_agreement: float = math.nan


def probe(
    model: StackModel, images_BCHW: Tensor, loss_of: Callable[[Tensor], Tensor], noise: Noise, precision: Precision
) -> list[BlockUses]:
    """Reads off all loops of all blocks, with the step's permutations and without stochastic depth or batch moments.

    loss_of: the loss of the (B, C) scores. precision: as in training.
    """
    walk = _Walk()
    with undisturbed(model, images_BCHW.device, precision), _walked(model, walk):
        loss = loss_of(model(images_BCHW, noise))
        # Asking for gradients leaves all accumulated ones, and DeepSpeed's hooks on them, alone. All are asked for:
        # the first one of a timm network may join behind the chain (CaiT's class token).
        torch.autograd.grad(loss, list(model.stem.parameters()), allow_unused=True)
    return walk.blocks()


@contextlib.contextmanager
def undisturbed(model: StackModel, device: torch.device, precision: Precision) -> Iterator[None]:
    """The model in evaluation mode and the precision of training; modes and random state as they were, afterwards."""
    modes = {module: module.training for module in model.modules()}
    # Whoever watches the calls of the head (feature distillation) means those of the training.
    watchers = dict(model.head._forward_pre_hooks)
    try:
        model.eval()
        model.head._forward_pre_hooks.clear()
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        # An fp16 run is looked at in bf16, whose range tells by how much fp16's is missed and needs no loss scale.
        # Eager, since other modes and shapes than the training's would be compiled for this alone.
        eager = torch.compiler.set_stance("force_eager")
        with forked, eager, torch.enable_grad(), autocast(device.type, "bf16" if precision == "fp16" else precision):
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
        model.head._forward_pre_hooks.update(watchers)


def _walked(model: StackModel, walk: "_Walk") -> contextlib.AbstractContextManager[None]:
    """The model's chains run by `walk`."""
    return chains_run_by(model.stages, lambda index: chain_of(_WalkFunction.apply, walk, index))


class _Walk:
    """The notes of one probe."""

    def __init__(self) -> None:
        self.uses: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        self.modules: dict[tuple[int, int], Application] = {}
        self.agreement: dict[tuple[int, int], _Agreement] = {}

    def forward(self, stage: int, applications: Sequence[Application], x_BND: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The chain's output, and the input of each application."""
        inputs = []
        for application in applications:
            inputs.append(x_BND)
            y_BND = application(x_BND)
            place = stage, application.slot.block
            self.uses.setdefault(place, []).append(_look(application, x_BND, y_BND))
            self.modules[place] = application
            x_BND = y_BND
        return x_BND, inputs

    def backward(
        self, stage: int, applications: Sequence[Application], inputs: list[Tensor], grad_BND: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of the chain's input and of its context."""
        sums = {tensor: torch.zeros_like(tensor) for tensor in context_of(applications)}
        for application in reversed(applications):
            leaf = inputs.pop().detach().requires_grad_()
            weights = _block_weights(application.block)
            context = tuple(tensor.detach().requires_grad_() for tensor in application.context)
            with torch.enable_grad():
                y_BND = (application.with_context(context) if context else application)(leaf)
            grad_BND, *gradients = torch.autograd.grad(y_BND, [leaf, *weights, *context], grad_BND)
            for tensor in reversed(application.context):
                sums[tensor] += gradients.pop()
            place = stage, application.slot.block
            gradient = torch.cat([value.flatten() for value in gradients])
            later = self.agreement.setdefault(place, _Agreement())
            self.uses[place][application.slot.position].update(later.add(gradient))
        return grad_BND, *sums.values()

    def blocks(self) -> list[BlockUses]:
        """The notes as numbers."""
        found = []
        for place, uses in self.uses.items():
            table = torch.stack([torch.stack([use[name] for name in (*FORWARD, *BACKWARD)]).float() for use in uses])
            columns = zip((*FORWARD, *BACKWARD), table.t().tolist(), strict=True)
            block = BlockUses(*place, _coefficients(self.modules[place]), dict(columns))
            block.gradient_agreement = self.agreement[place].mean_cosine()
            found.append(block)
        return found


class _Agreement:
    """Cosines between the gradients of a block's uses, which come last use first, without keeping them all."""

    def __init__(self) -> None:
        self.count = 0
        self.unit_sum: Tensor | None = None
        self.later: Tensor | None = None

    def add(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradient's norm, and its cosine to the one of the next use."""
        norm = gradient.norm()
        unit = gradient / norm
        cosine = norm.new_full((), math.nan) if self.later is None else torch.dot(unit, self.later)
        self.unit_sum = unit if self.unit_sum is None else self.unit_sum + unit
        self.later, self.count = unit, self.count + 1
        return {"gradient_norm": norm, "gradient_cosine": cosine}

    def mean_cosine(self) -> float:
        """Over all pairs of uses: the squared norm of the sum of unit vectors is the sum over all pairs."""
        assert self.unit_sum is not None
        pairs = self.count * (self.count - 1)
        return (float(self.unit_sum.square().sum()) - self.count) / pairs if pairs else math.nan


class _WalkFunction(torch.autograd.Function):
    """A chain that is run, and run back, by a walk."""

    @staticmethod
    def forward(
        ctx: Any, walk: _Walk, stage: int, applications: Sequence[Application], x_BND: Tensor, *context: Tensor
    ) -> Tensor:
        y_BND, inputs = walk.forward(stage, applications, x_BND)
        ctx.state = walk, stage, applications, inputs
        return y_BND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:
        walk, stage, applications, inputs = ctx.state
        return None, None, None, *walk.backward(stage, applications, inputs, grad_BND)


def _block_weights(block: nn.Module) -> list[nn.Parameter]:
    """The parameters that every use of the block reads: conditioning belongs to single loops."""
    return [value for name, value in block.named_parameters() if not name.startswith("conditioning.")]


def _look(application: Application, x_BND: Tensor, y_BND: Tensor) -> dict[str, Tensor]:
    """The FORWARD statistics of one use."""
    slot, block = application.slot, application.block
    skip_BND = application.reordered(_stream(application, x_BND))
    out_BND = _stream(application, y_BND)
    with application.autocast():
        qkv_BNC = block.qkv(application.block_inputs(x_BND)[0], slot.loop, slot.place)
    bias = None if application.hidden is None else block.attention.bias(application.hidden)
    added = entropy = rms(out_BND).new_full((), math.nan)
    largest = out_BND.abs().max().float()
    if qkv_BNC is not None:
        if block.is_causal:
            length = qkv_BNC.shape[1] // slot.groups
            bias = qkv_BNC.new_full((length, length), HIDDEN, dtype=torch.float32).triu(1)
        if application.sight is not None and (mask := application.sight.mask) is not None:
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, HIDDEN)[:, None]
        entropy = attention_entropy(qkv_BNC, slot.groups, block.num_heads, bias)
        largest = torch.maximum(largest, qkv_BNC.abs().max().float())
    if not block.norms_after:
        kept_BND = _stream(application, application.skipped(x_BND))
        added = rms(out_BND - kept_BND) / rms(kept_BND)
    return {
        "rms": rms(out_BND),
        "branch_ratio": added,
        "step_ratio": rms(out_BND - skip_BND) / rms(out_BND),
        "token_cosine": token_cosine(out_BND),
        "rank_ratio": rank_ratio(out_BND),
        "attention_entropy": entropy,
        "max_abs": largest,
    }


def _stream(application: Application, state_BND: Tensor) -> Tensor:
    """The stream alone, without the stage's input and without channels that are padding, tokens in one dimension."""
    stream_BND = state_BND.chunk(2, dim=1)[0] if application.injected else state_BND
    return stream_BND[..., : application.block.width].flatten(1, -2)


def _coefficients(application: Application) -> dict[str, float]:
    """alpha and beta (multiplier included; means over the channels) of the block's residuals and of the projection."""
    slot, found = application.slot, {}
    residuals = {str(number): residual for number, residual in enumerate(application.block.residuals, start=1)}
    if application.projection is not None:
        residuals["_projection"] = application.projection.residual
    for name, residual in residuals.items():
        constants = None if slot.place is None else (slot.place.projection if "_" in name else slot.place.block)
        multiplier, stream = constants or (residual.multiplier, residual.stream_constant)
        found[f"alpha{name}"] = stream * (1.0 if residual.alpha is None else float(residual.alpha.detach()))
        assert residual.beta is not None
        found[f"beta{name}"] = multiplier * float(residual.beta.detach().mean())
    return found
