"""One rank of the engine tests: `python -m tests.ranks.engine_ranks OUT_FOLDER`, in an environment that names its rank.

Every ZeRO stage trains the same ten steps, straight and with a save and a load after five, on one and the same start.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sret_scale.config.ds_config import load_ds_config
from sret_scale.config.run_config import OptimConfig
from sret_scale.model import Noise, SReT, SReTConfig, Stage, Stem
from sret_scale.model.vision.stem import SyncBatchNorm
from sret_scale.train.checkpoint_writer import CheckpointWriter
from sret_scale.train.distributed import (
    Ranks,
    average_buffers,
    differentiable_sum,
    from_rank,
    gather_fragments,
    leave,
    ranks_from_environment,
    sum_over_ranks,
)
from sret_scale.train.engine.engine import Engine, start_communication
from sret_scale.train.engine.snapshot import RankTensor, Snapshot, WholeTensor
from sret_scale.train.optim import WeightAverage, build_optimizer, set_rates
from tests.tiny import TINY_MODEL

DS_CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero1_autocast")
MICRO_BATCH, ACCUMULATION, STEPS, RATE = 4, 2, 10, 2e-3
OPTIM = OptimConfig(eps=1e-4)
"""With Adam's usual 1e-8, parameters whose true gradient is 0 (a bias before a BatchNorm, a key's bias) would follow
the sign of rounding errors at full rate."""


def batch(step: int, micro_step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a micro-batch that is the same for every world size."""
    generator = torch.Generator().manual_seed(1000 * step + micro_step)
    images = torch.randn(MICRO_BATCH * world_size, 3, 28, 28, generator=generator)
    labels = torch.randint(10, (MICRO_BATCH * world_size,), generator=generator)
    mine = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    return images[mine], labels[mine]


def make_engine(name: str, config: SReTConfig = TINY_MODEL) -> Engine:
    torch.manual_seed(0)
    model = SReT(config)
    ds_config = load_ds_config(name)
    if name == "zero3":
        # The shipped threshold keeps parameters of this size whole; here they must really be partitioned.
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Engine(
        model,
        build_optimizer(model, model.parameter_tags(), OPTIM),
        ds_config,
        micro_batch_size=MICRO_BATCH,
        grad_accum_steps=ACCUMULATION,
        z3_leaf_modules=(Stage,),
    )


def train(engine: Engine, average: WeightAverage, steps: range, ranks: Ranks) -> None:
    for step in steps:
        set_rates(engine.param_groups, RATE / (1 + step))
        for micro_step in range(ACCUMULATION):
            images, labels = batch(step, micro_step, ranks.rank, ranks.world_size)
            logits = engine.forward(images, Noise(permutation_seed=step, sample_seed=step + ranks.rank))
            engine.backward(F.cross_entropy(logits.float(), labels))
            engine.step()
        average_buffers(engine.buffers())
        average.update(engine.local_weights(), 16)


def rank_tensors(engine: Engine, average: WeightAverage) -> list[RankTensor]:
    return [
        *engine.rank_tensors("weights", engine.local_weights()),
        *engine.optimizer_tensors(),
        *engine.rank_tensors("ema", average.averages),
    ]


def state(engine: Engine, average: WeightAverage, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint would hold, on every rank."""
    snapshot = Snapshot(is_main=ranks.is_main)
    snapshot.take(rank_tensors(engine, average))
    # By pickle, through the object broadcast: it is the test that needs the whole state everywhere, not the product.
    return from_rank(snapshot.whole(functools.partial(gather_fragments, group=None)))


def main(folder: Path) -> None:
    ranks = ranks_from_environment()
    start_communication(ranks)
    with without_onednn():
        train_all(folder, ranks)
    save_sync_batch_norm(folder, ranks)
    save_into_a_file(folder, ranks)
    leave()


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """oneDNN sums a convolution in an order that depends on the size of the batch."""
    # Its own context manager sets TF32 too, and warns of that on a CPU.
    is_enabled, *_ = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(is_enabled)


def train_all(folder: Path, ranks: Ranks) -> None:
    """Every ZeRO stage in turn, straight and resumed, and a save beside the training."""
    for name in DS_CONFIGS:
        engine = make_engine(name)
        average = WeightAverage(engine.local_weights(), 100)
        train(engine, average, range(STEPS // 2), ranks)
        half, updates = state(engine, average, ranks), average.num_updates
        train(engine, average, range(STEPS // 2, STEPS), ranks)
        straight = state(engine, average, ranks)
        resumed = make_engine(name)
        resumed.load_weights(half["weights"])
        resumed.load_optimizer_state(half["optimizer"], {})
        average = WeightAverage(resumed.local_weights(), 100)
        average.averages, average.num_updates = resumed.partition(half["ema"]), updates
        train(resumed, average, range(STEPS // 2, STEPS), ranks)
        norm = engine.grad_norm()
        # Trained on while it is written: the file must have the state of the call.
        with CheckpointWriter(folder / name, ranks, keep=1) as writer:
            writer.start(rank_tensors(engine, WeightAverage(engine.local_weights(), 100)), step=STEPS, state={})
            train(engine, WeightAverage(engine.local_weights(), 100), range(STEPS, STEPS + 1), ranks)
        norms = {"grad_norm": torch.tensor([norm, resumed.grad_norm()])}
        again = state(resumed, average, ranks)
        if ranks.is_main:
            for label, sets in (("straight", straight), ("resumed", again)):
                for what, tensors in sets.items():
                    save_file(tensors, folder / f"{name}.{label}.{what}.safetensors")
            save_file(norms, folder / f"{name}.norms.safetensors")


def save_into_a_file(folder: Path, ranks: Ranks) -> None:
    """A save that rank 0 cannot make; each rank leaves what it was told."""
    blocked = folder / "blocked"
    blocked.write_text("not a folder")
    with contextlib.suppress(OSError), CheckpointWriter(blocked, ranks, keep=1) as writer:
        entry = WholeTensor(set_name="weights", name="a", shape=torch.Size([2]))
        writer.start([RankTensor(values=torch.ones(2), is_fragment=False, wholes=(entry,))], step=1, state={})
        try:
            writer.wait()
        except OSError as error:
            (folder / f"refused.{ranks.rank}.txt").write_text(str(error))


def save_sync_batch_norm(folder: Path, ranks: Ranks) -> None:
    """The stem with BatchNorm over all ranks: each rank's outputs, and gradients summed over the ranks."""
    torch.manual_seed(0)
    stem = Stem(replace(TINY_MODEL, stem_norm="sync_batch"))
    for module in stem.modules():
        if isinstance(module, SyncBatchNorm):
            module.all_reduce = differentiable_sum
    images, _ = batch(0, 0, ranks.rank, ranks.world_size)
    outputs = stem(images)
    outputs.square().sum().backward()
    gradients = {name: sum_over_ranks(value.grad) for name, value in stem.named_parameters() if value.grad is not None}
    save_file(
        {"outputs": outputs.detach().contiguous(), **gradients, **dict(stem.named_buffers())},
        folder / f"stem.{ranks.rank}.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
