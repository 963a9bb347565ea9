"""What a run will do, said before anything starts: the memory of a rank, the shards that a node reads."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from data_pipelines.remote.shard_sets import open_training_data
from data_pipelines.shards.classes import classes_without_samples, describe_missing
from data_pipelines.stream.order import Order
from sret_scale.config.ds_config import load_ds_config, precision_of, zero_stage_of
from sret_scale.config.image_counts import describe_counts
from sret_scale.config.run_config import RunConfig, to_plain
from sret_scale.launch.nodes import Place
from sret_scale.memory.planning.micro_batch import BatchSearch
from sret_scale.memory.planning.rank_state import format_bytes, state_bytes
from sret_scale.memory.planning.step_cost import DEVICES
from sret_scale.train.load_run import open_test_data
from sret_scale.train.recomputation import bytes_beside, set_up_recomputation


def describe_run(config: RunConfig, place: Place) -> Iterator[str]:
    """Lines for the terminal."""
    shards = open_training_data(config.data)
    missing = classes_without_samples(test := open_test_data(config, shards))
    if missing:
        yield describe_missing(missing, test.folder)
    yield from describe_counts(to_plain(config), shards.num_samples)
    yield describe_memory(config, sum(place.ranks_of_nodes))
    for host, line in zip(place.hosts, describe_shards(config, place.ranks_of_nodes), strict=True):
        yield f"{host.name}: {line}"


def describe_memory(config: RunConfig, world_size: int) -> str:
    """The plan of memory of one rank, as the planner predicts it."""
    ds_config = load_ds_config(config.engine.ds_config)
    with torch.device("meta"):
        model = config.model.build()
    prepared = set_up_recomputation(model, config, world_size)
    costs = BatchSearch(config.model, precision_of(ds_config), DEVICES["cpu"]).costs(1)
    state = state_bytes(costs, world_size=world_size, zero_stage=zero_stage_of(ds_config))
    beside = bytes_beside(config, world_size)
    parts = {
        "weights": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "buckets": state.buckets,
        "activations": prepared.activations,
        "teacher": beside,
    }
    text = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
    schedule = f"chosen for {config.memory.budget_bytes:,} bytes" if prepared.plan else config.memory.schedule
    return f"memory of a rank: {format_bytes(sum(parts.values()))}: {text}; recomputation: {schedule}"


def describe_shards(config: RunConfig, ranks_of_nodes: list[int]) -> Iterator[str]:
    """For every node, how many shards its ranks read in the first epoch, and in the first step alone."""
    shards = open_training_data(config.data)
    global_batch_size = config.train.global_batch_size
    order = Order.of(shards, config.data, seed=config.train.seed, global_batch_size=global_batch_size)
    num_steps = max(1, order.epoch_length // global_batch_size)
    positions = np.arange(num_steps * global_batch_size, dtype=np.int64)
    shard_of_SB = shards.shard_of[order.samples(0, positions)].reshape(num_steps, global_batch_size)
    # A rank's samples of a step are neighbours, and so are the ranks of a node.
    per_rank = global_batch_size // sum(ranks_of_nodes)
    borders = np.cumsum([0, *ranks_of_nodes]) * per_rank
    for first, last in itertools.pairwise(borders):
        of_node_SB = shard_of_SB[:, first:last]
        epoch, step = len(np.unique(of_node_SB)), len(np.unique(of_node_SB[0]))
        yield f"reads {epoch} of {shards.num_shards} shards in the first epoch, {step} in the first step"
