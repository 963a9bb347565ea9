"""A stage's chain as loops instead of one application after another, for exporters that have an operation for it.

Applications that differ in what a loop owns alone become one `scan`: the tied block's weights are shared by its turns,
and what a loop owns (its projection, its conditioning, its permutation) is stacked and read turn by turn. The program
then has as many bodies as a stage has (block, number of groups) pairs, whatever the number of loops.
"""

import itertools
from typing import cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.func import functional_call

from sret_scale.model.conditioning import InputInjection
from sret_scale.model.permutation import TokenOrder, as_index, reorder_tokens
from sret_scale.model.stack import StackModel
from sret_scale.model.stage import Application, Stage

# Parameters and buffers of `conditioning` with one row a loop.
_PER_LOOP = ("delta", "features", "down", "up_qkv", "up_fc1", "gain")


def keep_loops(model: StackModel) -> None:
    """Make every stage of a folded model run its chain as loops, for `torch.export`; a plain pass works too."""
    for index in range(len(model.stages)):
        model.stages[index] = LoopedStage(cast(Stage, model.stages[index]))


class LoopedStage(nn.Module):
    """A stage for inference whose chain was built, and what its turns own stacked, beforehand."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        num_tokens = stage.config.num_tokens(stage.index)
        width = next(stage.parameters()).new_empty(1, num_tokens, 1)
        order = TokenOrder(stage._draw_permutations(stage.slots, width, None))
        applications = stage.chain(stage.slots, width, order, None, None)
        self.back = order.move_to(None)
        # One turn is one application, or one of every block where the blocks alternate.
        config = stage.config.stages[stage.index]
        turn = 1 if config.loop_order == "block" else config.num_blocks
        turns = [tuple(applications[start : start + turn]) for start in range(0, len(applications), turn)]
        # Blocks that share their projections share the stack of them too.
        self._known: dict[tuple[int, ...], tuple[list[Tensor], str]] = {}
        self.parts: list[tuple[tuple[Application, ...], list[dict[str, str]]]] = []
        for _, group in itertools.groupby(turns, lambda applications: tuple(map(_kind, applications))):
            alike = list(group)
            rows = [_rows([turn[position] for turn in alike]) for position in range(len(alike[0]))]
            self.parts.append((alike[0], [self._registered(part) for part in rows] if len(alike) > 1 else []))

    def _registered(self, rows: dict[str, list[Tensor]]) -> dict[str, str]:
        """Keep the rows stacked as buffers, the same rows once; name of each -> the buffer's."""
        names = {}
        for name, tensors in rows.items():
            key = tuple(map(id, tensors))
            if key not in self._known:
                # The tensors stay alive with their numbers.
                self._known[key] = tensors, f"stack_{len(self._buffers)}"
                self.register_buffer(self._known[key][1], torch.stack(tensors))
            names[name] = self._known[key][1]
        return names

    def forward(self, x_BND: Tensor, noise: None = None) -> Tensor:
        """The stream after all applications; there is no noise in inference."""
        windows = self.stage.windows
        if windows is not None:
            x_BND = windows.padded(x_BND)
        if self.stage.injected:
            x_BND = torch.cat([x_BND, x_BND], dim=1)
        for first, names in self.parts:
            if not names:
                for application in first:
                    x_BND = application(x_BND)
                continue
            stacks = [{name: getattr(self, buffer) for name, buffer in own.items()} for own in names]
            x_BND = _scanned(first, stacks, x_BND)
        if self.stage.injected:
            x_BND = x_BND.chunk(2, dim=1)[0]
        x_BND = x_BND if self.back is None else reorder_tokens(x_BND, *self.back)
        return x_BND if windows is None else windows.cropped(x_BND)


def _scanned(first: tuple[Application, ...], stacks: list[dict[str, Tensor]], x_BND: Tensor) -> Tensor:
    def body(x_BND: Tensor, slices: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        for application, own in zip(first, slices, strict=True):
            x_BND = _call(application, own, x_BND)
        # A scan has to put out something every turn.
        return x_BND.clone(), x_BND.new_zeros(())

    if torch.compiler.is_exporting():
        return scan(body, x_BND, stacks)[0]
    # Outside an exporter a scan would be compiled first.
    for turn in range(len(stacks[0]["turn"])):
        x_BND, _ = body(x_BND, [{name: tensor[turn] for name, tensor in own.items()} for own in stacks])
    return x_BND


def _kind(application: Application) -> tuple[int, int, bool]:
    return application.slot.block, application.slot.groups, application.gather is None


def _rows(applications: list[Application]) -> dict[str, list[Tensor]]:
    """What differs between uses of one block, a row a use, by a name of its part and within it; never empty."""
    own: dict[str, list[Tensor]] = {"turn": [torch.tensor(float(turn)) for turn in range(len(applications))]}
    for application in applications:
        if application.gather is not None:
            own.setdefault("gather", []).append(as_index(application.gather))
        if application.hidden is not None:
            own.setdefault("hidden", []).append(application.hidden)
        conditioning = application.block.conditioning
        if conditioning is not None:
            tensors = dict(itertools.chain(conditioning.named_parameters(), conditioning.named_buffers()))
            rows = {
                name: tensor[application.slot.loop]
                for name, tensor in tensors.items()
                if _is_per_loop(name, conditioning)
            }
            for name, row in rows.items():
                own.setdefault(f"conditioning.{name}", []).append(row[None])
    projections = [application.projection for application in applications]
    if projections[0] is not None and any(projection is not projections[0] for projection in projections):
        states = [dict(projection.named_parameters()) for projection in projections if projection is not None]
        for name in states[0]:
            own[f"projection.{name}"] = [state[name] for state in states]
    return own


def _is_per_loop(name: str, conditioning: nn.Module) -> bool:
    # A smooth function of the depth has its coordinate per loop, and one matrix for all; a tied gain is one row.
    is_shared = (name == "delta" and hasattr(conditioning, "features")) or (name == "gain" and conditioning.is_tied)
    return name in _PER_LOOP and not is_shared


def _call(application: Application, own: dict[str, Tensor], x_BND: Tensor) -> Tensor:
    """The application with what its turn owns in the place of its own."""

    def reordered(x_BND: Tensor) -> Tensor:
        return x_BND.index_select(1, own["gather"]) if "gather" in own else x_BND

    block, projection = application.block, application.projection
    conditioned = {name: tensor for name, tensor in own.items() if name.startswith("conditioning.")}
    # A tensor of one row stands for those of all loops, so that the block reads row 0.
    loop = 0 if conditioned else application.slot.loop
    input_BND: Tensor | None = None
    if application.injected:
        x_BND, input_BND = map(reordered, x_BND.chunk(2, dim=1))
        injection = block.conditioning
        assert isinstance(injection, InputInjection)
        rows = {name.removeprefix("conditioning."): tensor for name, tensor in conditioned.items()}
        x_BND = functional_call(injection, rows, (x_BND, input_BND, loop))
    else:
        x_BND = reordered(x_BND)
    use = (x_BND, loop, application.slot.groups, None, None, None, own.get("hidden"))
    x_BND = functional_call(block, conditioned, use)
    if projection is not None:
        weights = {
            name.removeprefix("projection."): tensor for name, tensor in own.items() if name.startswith("projection.")
        }
        x_BND = functional_call(projection, weights, (x_BND,))
    x_BND = block.finished(x_BND)
    return x_BND if input_BND is None else torch.cat([x_BND, input_BND], dim=1)
