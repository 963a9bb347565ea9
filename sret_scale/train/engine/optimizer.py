"""The optimiser: AdamW, LAMB or Muon, for whole tensors and for the flat fragments that ZeRO makes of them.

One class for all: DeepSpeed hands its flat tensors to `step`, and the layout says which parameters lie in them. So a
parameter that took no part in a step stays as it is, moments and count of updates included, at every ZeRO stage, and
LAMB finds the norms of parameters that are cut over ranks.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim._muon import muon
from torch.optim.adamw import adamw

from sret_scale.model.upload import uploaded
from sret_scale.train.engine.apex_door import ApexKernels
from sret_scale.train.engine.zero_layout import Fragment, Layout

Rule = Literal["adamw", "lamb", "muon"]

MOMENTS: dict[Rule, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "muon": ("exp_avg",),
}
"""What each rule keeps of a parameter, beside the count of updates."""

# Of Keller Jordan's description (kellerjordan.github.io/posts/muon), as torch.optim.Muon has them by default.
MUON_MOMENTUM = 0.95
MUON_COEFFICIENTS = (3.4445, -4.775, 2.0315)
MUON_STEPS = 5


class _MovingFragment(NamedTuple):
    """One parameter, or as much of it as lies in one tensor of the optimiser, with all that an update needs."""

    name: str
    updates: int
    """The parameter's updates, this one included."""
    value: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer(torch.optim.Optimizer):
    """Updates parameter groups by their `rule`; rates, decay and eps are per group.

    Each group has `names`, those of its parameters on all ranks. `layout` is what the engine finds after ZeRO cut the
    parameters. State is what torch's AdamW keeps (Muon's momentum is an `exp_avg` too); `step` counts the updates made.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "rule": "adamw"})
        self.layout: Layout = {}
        self._held: frozenset[str] = frozenset()
        self._is_off = False
        self.missed: dict[str, int] = {}
        """Updates of the run that left a parameter alone, where there were any."""
        self.is_cut = False
        """True where ZeRO cut parameters over ranks."""
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values
        self.apex: ApexKernels | None = None

    @contextlib.contextmanager
    def holding(self, names: frozenset[str], *, everything: bool) -> Iterator[None]:
        """Inside, the one update that is made leaves the parameters `names` alone, or everything."""
        self._held, self._is_off = names, everything
        try:
            yield
        finally:
            self._held, self._is_off = frozenset(), False
        if not everything:
            self._count_missed(names)

    def _count_missed(self, names: Iterable[str]) -> None:
        for name in names:
            self.missed[name] = self.missed.get(name, 0) + 1

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # torch types a closure that we refuse
        """One update of every group; DeepSpeed's ZeRO calls it once a group."""
        assert closure is None
        if self._is_off:
            return
        # Without an engine, nobody has said yet which parameters took no part.
        absent = frozenset() if self.is_cut else self._without_gradient() - self._held
        self._held |= absent
        for group in self.param_groups:
            owners = group["params"]
            if group["rule"] == "muon":
                self._muon(group, owners)
                continue
            fragments = [fragment for owner in owners for fragment in self._moving(owner)]
            if owners and group["rule"] == "lamb":
                # Every rank comes here: the norms of a parameter that is cut are summed over all of them.
                self._lamb(group, fragments)
            else:
                self._adamw(group, fragments)
        self._held -= absent
        self._count_missed(absent)

    def _without_gradient(self) -> frozenset[str]:
        owners = (owner for group in self.param_groups for owner in group["params"] if owner.grad is None)
        return frozenset(fragment.name for owner in owners for fragment in self.layout[owner])

    def _moving(self, owner: Tensor) -> list[_MovingFragment]:
        """The fragments of `owner` that move.

        Parameter by parameter, because the last elements of a tensor go through another code of torch's kernel, which
        rounds differently: so the bits do not depend on which parameters ZeRO laid end to end.
        """
        state = self._count(owner, ("exp_avg", "exp_avg_sq"))
        updates, fragments = int(state["step"]), self.layout[owner]
        if all(fragment.name in self._held for fragment in fragments):
            return []
        tensors = (owner, cast(Tensor, owner.grad), state["exp_avg"], state["exp_avg_sq"])
        if len(fragments) == 1 and fragments[0].length == owner.numel():
            # What ZeRO did not cut, in fewer words: there are hundreds of them in every step.
            name = fragments[0].name
            return [_MovingFragment(name, updates - self.missed.get(name, 0), *tensors)]
        return [
            _MovingFragment(fragment.name, updates - self.missed.get(fragment.name, 0), *values)
            for fragment, values in zip(
                fragments, zip(*(_cut(tensor, fragments) for tensor in tensors), strict=True), strict=True
            )
            if fragment.name not in self._held
        ]

    def _count(self, owner: Tensor, moments: Sequence[str]) -> dict[str, Tensor]:
        """The state of `owner`, made where there is none, with this update counted."""
        state: dict[str, Tensor] = self.state[owner]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({moment: torch.zeros_like(owner) for moment in moments})
        state["step"] += 1
        return state

    def _adamw(self, group: dict[str, Any], fragments: Sequence[_MovingFragment]) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
        if not fragments:
            return
        device = fragments[0].value.device
        if self.apex and device.type == "cuda":
            self.apex.adamw(_lists(fragments), [fragment.updates for fragment in fragments], group)
            return
        beta1, beta2 = group["betas"]
        # torch counts up before it updates, and its fused kernel wants the counts on the device.
        counts = uploaded(torch.tensor([fragment.updates - 1.0 for fragment in fragments]), device).unbind()
        values, gradients, exp_avgs, exp_avg_sqs = _lists(fragments)
        adamw(
            values,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            list(counts),
            # One pass over memory, on CPUs too: 3.5 ms in place of 12.5 for SReT-T on one core.
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _lamb(self, group: dict[str, Any], fragments: Sequence[_MovingFragment]) -> None:
        """LAMB (You et al., arXiv 1904.00962, algorithm 2, phi the identity); a tensor of the model is a layer.

        The ratio is 1 where a norm is 0, as for what starts at zero.
        """
        if self.apex and not self.is_cut and fragments and fragments[0].value.is_cuda:
            self.apex.lamb(_lists(fragments), [fragment.updates for fragment in fragments], group)
            return
        beta1, beta2 = group["betas"]
        place = {name: index for index, name in enumerate(group["names"])}
        device = fragments[0].value.device if fragments else torch.device("cpu")
        squares = torch.zeros(2, len(place), dtype=torch.float64, device=device)
        updates = []
        for fragment in fragments:
            fragment.exp_avg.lerp_(fragment.gradient, 1 - beta1)
            fragment.exp_avg_sq.mul_(beta2).addcmul_(fragment.gradient, fragment.gradient, value=1 - beta2)
            root = (fragment.exp_avg_sq / (1 - beta2**fragment.updates)).sqrt_()
            update = (fragment.exp_avg / (1 - beta1**fragment.updates)).div_(root.add_(group["eps"]))
            updates.append(update.add_(fragment.value, alpha=group["weight_decay"]))
            for row, tensor in enumerate((fragment.value, update)):
                squares[row, place[fragment.name]] += torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        weight_norms, update_norms = self.sum_over_ranks(squares).sqrt()
        is_adapted = (weight_norms > 0) & (update_norms > 0)
        ratios = torch.where(is_adapted, weight_norms / update_norms, 1.0).to(torch.float32)
        for fragment, update in zip(fragments, updates, strict=True):
            fragment.value.sub_(update.mul_(ratios[place[fragment.name]]), alpha=group["lr"])

    def _muon(self, group: dict[str, Any], matrices: Sequence[Tensor]) -> None:
        """Muon on whole matrices, its step scaled to the size of AdamW's, so that one rate serves both."""
        moving = [matrix for matrix in matrices if self.layout[matrix][0].name not in self._held]
        states = [self._count(matrix, ("exp_avg",)) for matrix in matrices]
        momentum = {matrix: state["exp_avg"] for matrix, state in zip(matrices, states, strict=True)}
        muon(
            moving,
            [cast(Tensor, matrix.grad) for matrix in moving],
            [momentum[matrix] for matrix in moving],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=MUON_MOMENTUM,
            nesterov=True,
            ns_coefficients=MUON_COEFFICIENTS,
            ns_steps=MUON_STEPS,
            eps=1e-7,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )


def _lists(fragments: Sequence[_MovingFragment]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Values, gradients and both moments of all `fragments`."""
    return (
        [fragment.value for fragment in fragments],
        [fragment.gradient for fragment in fragments],
        [fragment.exp_avg for fragment in fragments],
        [fragment.exp_avg_sq for fragment in fragments],
    )


def _cut(tensor: Tensor, fragments: Sequence[Fragment]) -> Sequence[Tensor]:
    """The elements of each fragment; one that is the whole tensor keeps its shape."""
    if len(fragments) == 1 and fragments[0].length == tensor.numel():
        return (tensor,)
    sizes, places, end = [], [], 0
    for fragment in fragments:
        if fragment.start > end:
            sizes.append(fragment.start - end)
        places.append(len(sizes))
        sizes.append(fragment.length)
        end = fragment.start + fragment.length
    cut = torch.split(tensor.view(-1), [*sizes, tensor.numel() - end])
    return [cut[place] for place in places]
