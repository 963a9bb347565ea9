"""A frozen teacher that answers for the batch the student sees.

    unit_BCHW in [0, 1] -> micro-batches -> own size -> own normalisation -> network -> logits_BC, fp32

A teacher is not an nn.Module, so that holding one adds nothing to a student's parameters, optimiser, EMA or checkpoint.
Shapes: B batch, C classes (channels in BCHW), H height, W width.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.distill.networks import LoadRun, Network, load_network
from sret_scale.distill.spec import parse_teacher

Precision = Literal["auto", "bf16", "fp32"]
ShardNetwork = Callable[[nn.Module, torch.device], Callable[[Tensor], Tensor]]


def build_teacher(
    spec: str,
    *,
    num_classes: int,
    device: torch.device | str,
    load_run: LoadRun,
    micro_batch_size: int | None = None,
    precision: Precision = "auto",
    compiled: bool = False,
    shard: ShardNetwork | None = None,
) -> "Teacher":
    """The teacher that a spec names, loaded, frozen, and proved on two images: what is wrong with it is said now.

    With `shard`, weights too large for one device are cut over the ranks by it, and all ranks must ask equally often.
    Raises ValueError for a spec that names nothing, another class count, features instead of logits, and NaN.
    """
    device = torch.device(device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    members = []
    for part in parse_teacher(spec):
        network = load_network(part, num_classes=num_classes, load_run=load_run)
        member = OnlineTeacher(
            part.text, network, device=device, micro_batch_size=micro_batch_size, precision=precision, shard=shard
        )
        check_teacher(member, num_classes)
        if compiled:
            member.compile()
        members.append(member)
    return members[0] if len(members) == 1 else EnsembleTeacher(members)


class OnlineTeacher:
    """One frozen network, with its own size, normalisation, micro-batch and precision."""

    def __init__(
        self,
        spec: str,
        network: Network,
        *,
        device: torch.device,
        micro_batch_size: int | None,
        precision: Precision,
        shard: ShardNetwork | None = None,
    ) -> None:
        self.spec, self.network, self.device = spec, network, device
        self.micro_batch_size, self.precision = micro_batch_size, precision
        self._is_sharded = shard is not None
        self._module = freeze(network.module, torch.device("cpu") if shard else device, precision)
        self._forward: Callable[[Tensor], Tensor] = shard(self._module, device) if shard else self._module
        self._mean = torch.tensor(network.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(network.std, device=device).view(-1, 1, 1)

    def describe(self) -> dict[str, Any]:
        """All that decides on this teacher's outputs, with a SHA-256 of its weights; as JSON would give it back."""
        assert not self._is_sharded, "a rank holds only a part of these weights"
        return {
            "spec": self.spec,
            "weights_sha256": hash_weights(self._module),
            "image_size": self.network.image_size,
            "interpolation": self.network.interpolation,
            "mean": list(self.network.mean),
            "std": list(self.network.std),
            "precision": self.precision,
        }

    @property
    def module(self) -> nn.Module:
        """The frozen network."""
        return self._module

    def compile(self) -> None:
        """Compile the network, apart from the student."""
        assert not self._is_sharded, "the gathering of weights cannot be compiled"
        self._forward = torch.compile(self._module)

    def __call__(self, unit_BCHW: Tensor) -> Tensor:
        with torch.inference_mode():
            parts = torch.split(unit_BCHW, self.micro_batch_size or len(unit_BCHW))
            outputs = [self.forward(part_BCHW) for part_BCHW in parts]
        # Concatenated outside inference mode: autograd refuses to save an inference tensor for the loss's backward.
        return torch.cat(outputs).float()

    def forward(self, unit_BCHW: Tensor) -> Tensor:
        """What the network gives for one micro-batch, unchecked."""
        images_BCHW = self.prepare(unit_BCHW).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._forward(images_BCHW)

    def prepare(self, unit_BCHW: Tensor) -> Tensor:
        """The same view at the teacher's size and normalisation. Bicubic weights overshoot [0, 1]: they are clamped."""
        size = (self.network.image_size, self.network.image_size)
        if tuple(unit_BCHW.shape[-2:]) != size:
            mode = self.network.interpolation
            unit_BCHW = F.interpolate(unit_BCHW, size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)
        if len(self.network.mean) == 1:
            # Luma, as Pillow's conversion to grey.
            unit_BCHW = (unit_BCHW * unit_BCHW.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        return (unit_BCHW - self._mean) / self._std


class EnsembleTeacher:
    """Several teachers as one: the logarithm of the average of their probabilities."""

    def __init__(self, members: Sequence[OnlineTeacher]) -> None:
        self.members = tuple(members)
        self.device = self.members[0].device

    def describe(self) -> dict[str, Any]:
        """The members' descriptions."""
        return {"members": [member.describe() for member in self.members]}

    def __call__(self, unit_BCHW: Tensor) -> Tensor:
        log_probs_MBC = torch.stack([F.log_softmax(member(unit_BCHW), dim=-1) for member in self.members])
        return torch.logsumexp(log_probs_MBC, dim=0) - math.log(len(self.members))


Teacher = OnlineTeacher | EnsembleTeacher
"""`teacher(unit_BCHW)` gives fp32 logits (B, C) without gradient."""


def hash_weights(module: nn.Module) -> str:
    """Hex SHA-256 of all parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def freeze(module: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """The module on the device, in eval mode, without gradients; in bf16, its matrices and convolutions are bf16.

    Norms, position tensors and learned scalars stay fp32: they cost nothing, and autocast runs them there anyway.
    """
    module = module.eval().requires_grad_(False).to(device)
    for layer in module.modules():
        if precision == "bf16" and isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(torch.bfloat16)
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def check_teacher(teacher: OnlineTeacher, num_classes: int) -> None:
    """Raise ValueError unless two images give two rows of finite logits, one for each class of the data."""
    network, name = teacher.network, f"teacher {teacher.spec!r}"
    shape = (2, len(network.mean), network.image_size, network.image_size)
    unit_BCHW = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(teacher.device)
    try:
        with torch.inference_mode():
            logits = teacher.forward(unit_BCHW)
    except RuntimeError as error:
        raise ValueError(f"{name} fails on two images of {network.image_size} px: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name}: expected logits of shape (2, {num_classes}), got {got}; "
            "it gives features, it needs its classification head"
        )
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"{name} has {logits.shape[1]} outputs, the data has {num_classes} classes; "
            "choose a teacher of these classes (or with its classification head, if these are features)"
        )
    if not logits.isfinite().all():
        raise ValueError(f"{name} gives NaN or infinite logits; its weights are damaged or not loaded")
