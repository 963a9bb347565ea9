"""One optimizer step, as functions that take what they need: forward and backward, the vote of the ranks, the update.

Nothing here draws from a global random generator: what is random is a function of a `Moment`, so a step that is
repeated after a restart has the same bits.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from data_pipelines.stream.loader import Batch, Step
from sret_scale.config.run_config import RunConfig
from sret_scale.config.step_depth import depth_plans, weighted_loss
from sret_scale.model import Noise
from sret_scale.model.depth_plan import DepthPlan
from sret_scale.model.noise import derived_seed, noise_at
from sret_scale.tasks.task import Inputs, Task
from sret_scale.train.assemble import Clock, Run
from sret_scale.train.distributed import Ranks, average_buffers, sum_over_ranks
from sret_scale.train.divergence import LeftOut, left_out
from sret_scale.train.engine.engine import Engine
from sret_scale.train.optim import WeightAverage, learning_rate, set_rates
from sret_scale.train.resume import tensors_of
from sret_scale.train.telemetry import Telemetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a run a micro-batch is: what its random numbers and its schedules are functions of."""

    seed: int
    step: int
    micro_step: int
    rank: int
    progress: float
    """The share of the run's images that lies behind."""

    def seed_for(self, purpose: str) -> int:
        return derived_seed(purpose, self.seed, self.step, self.micro_step, self.rank)

    @property
    def noise(self) -> Noise:
        return noise_at(self.seed, self.step, self.micro_step, self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of a step: numbers to log, why its update was left out where it was, whether any rank must stop."""

    numbers: dict[str, float]
    left_out: LeftOut | None
    is_stopping: bool


def optimizer_step(run: Run, step: Step, clock: Clock, *, must_stop: Callable[[], bool]) -> StepResult:
    """One update on the global batch of `step`; all ranks must call it.

    Where a loss or the gradient is not finite, on any rank, it is left out on all: weights, optimiser, moving average
    and BatchNorm's statistics stay as they were, bit for bit.
    must_stop: asked once the gradient is there, so that a signal that came meanwhile ends the run with this step.
    """
    config, ranks, engine = run.config, run.ranks, run.engine
    rate = learning_rate(config, clock.samples)
    set_rates(engine.param_groups, rate)
    before = {name: value.clone() for name, value in engine.buffers().items()}
    plans = plans_of(config, clock)
    here = Moment(
        seed=config.train.seed,
        step=clock.step,
        micro_step=0,
        rank=ranks.rank,
        progress=clock.samples / config.train.total_images,
    )

    def loss_of(micro_step: int, batch: Batch) -> Tensor:
        moment = dataclasses.replace(here, micro_step=micro_step)
        inputs = run.task.inputs(batch, seed=moment.seed_for("augment"), device=ranks.device)
        run.watchdog.progress(clock.step, "computing")
        telemetry = run.telemetry if micro_step == 0 else None
        return micro_batch_loss(engine.forward, run.task, inputs, moment, config=config, plans=plans, probe=telemetry)

    with run.phase("computing", clock):
        loss = forward_backward(engine, step.micro_batches, loss_of, ranks.device)
    with run.phase("in a collective", clock):
        losses, is_stopping = vote(loss, must_stop=must_stop() or run.writer.has_failed, ranks=ranks)
        if run.telemetry:
            run.telemetry.before_update()
        is_rejected = not all(map(math.isfinite, losses))
        num_samples = run.loader.global_batch_size
        is_updated = update(engine, run.average, before, is_rejected=is_rejected, num_samples=num_samples)
        what = None
        if is_updated:
            # Here at the latest there are moments: a start's first step pays for the memory, not its first save.
            run.writer.reserve(tensors_of(run))
        else:
            norms, is_overflow = engine.last_norms, engine.has_overflowed
            what = left_out(step, run.train_shards, rank_losses=losses, norms=norms, is_overflow=is_overflow)
    numbers = {"loss": sum(losses) / ranks.world_size, "lr": rate, "grad_norm": engine.grad_norm()}
    return StepResult(numbers=numbers, left_out=what, is_stopping=is_stopping)


def plans_of(config: RunConfig, clock: Clock) -> tuple[DepthPlan, ...] | None:
    """The depth of a step: the same on every rank, in every micro-step and after a restart."""
    progress = clock.samples / (config.depth.growth_images or config.train.total_images)
    return depth_plans(config.depth, config.model, seed=config.train.seed, step=clock.step, progress=progress)


def forward_backward(
    engine: Engine, batches: Sequence[Batch], loss_of: Callable[[int, Batch], Tensor], device: torch.device
) -> Tensor:
    """The mean loss of this rank's micro-batches, their gradients accumulated in the engine."""
    total = torch.zeros((), device=device)
    for micro_step, batch in enumerate(batches):
        loss = loss_of(micro_step, batch)
        total += loss.detach() / len(batches)
        engine.backward(loss)
        if micro_step < len(batches) - 1:
            engine.step()
    return total


def micro_batch_loss(
    forward: Callable[..., Tensor],
    task: Task,
    inputs: Inputs,
    moment: Moment,
    *,
    config: RunConfig,
    plans: tuple[DepthPlan, ...] | None,
    probe: Telemetry | None = None,
) -> Tensor:
    """The mean loss of one rank's micro-batch; `probe` looks at it before, where one is due."""
    if config.model.permutation == "random":
        # The reference's way draws from the global generator: here too, a function of the step.
        torch.manual_seed(moment.seed_for("global"))

    def loss_of(scores: Tensor, part: slice = slice(None), loops: int = config.model.stages[-1].num_loops) -> Tensor:
        return task.loss(scores, inputs, progress=moment.progress, loops=loops, part=part)

    if probe and probe.is_due(moment.step):
        probe.look(inputs.model_input, loss_of, moment.noise, plans[0] if plans else None)
    if plans is None:
        loss = loss_of(forward(inputs.model_input, moment.noise))
    else:
        scores_of_plans = forward(inputs.model_input, moment.noise, plans)
        ends = [count for plan in plans for count in plan.ends]
        losses = [loss_of(scores, loops=end) for scores, end in zip(scores_of_plans, ends, strict=True)]
        loss = weighted_loss(config.depth, plans, losses)
    added = task.added_loss(progress=moment.progress)
    return loss if added is None else loss + added


def vote(loss: Tensor, *, must_stop: bool, ranks: Ranks) -> tuple[list[float], bool]:
    """(the loss of every rank, whether any rank must stop).

    Ranks must agree before the update: a loss that is not a number on one of them would spread to all.
    """
    shared = torch.zeros(1 + ranks.world_size, device=ranks.device)
    shared[0], shared[1 + ranks.rank] = float(must_stop), loss
    num_stopping, *losses = sum_over_ranks(shared).tolist()
    return losses, num_stopping > 0


def update(
    engine: Engine,
    average: WeightAverage | None,
    buffers_before: Mapping[str, Tensor],
    *,
    is_rejected: bool,
    num_samples: int,
) -> bool:
    """Clip, update weights and moving average: True; or False, and buffers are again what they were before the step."""
    if engine.step(is_rejected=is_rejected):
        average_buffers(engine.buffers())
        if average:
            average.update(engine.local_weights(), num_samples)
        return True
    for name, value in engine.buffers().items():
        value.copy_(buffers_before[name])
    return False
