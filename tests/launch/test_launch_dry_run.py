"""What a dry run says of memory, roles and shards, against the loader that would read them."""

import re
from dataclasses import replace
from itertools import islice
from typing import Literal

import pytest

from data_pipelines.shards.index import open_shards
from data_pipelines.stream.loader import LoaderState, TrainLoader
from sret_scale.config.run_config import RunConfig
from sret_scale.launch.dry_run import describe_memory, describe_shards
from tests.tiny import tiny_config, tiny_shards


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    tiny = tiny_config(tiny_shards(tmp_path_factory.mktemp("shards")))
    return replace(tiny, train=replace(tiny.train, micro_batch_size=2))


def read_by_ranks(config: RunConfig, students: list[int]) -> list[tuple[int, int]]:
    """(shards of the first epoch, shards of the first step) for each node, from the loaders of its ranks."""
    world_size = sum(students)
    accumulation = config.train.global_batch_size // world_size // config.train.micro_batch_size
    found = []
    for node, number in enumerate(students):
        epoch, step = set[int](), set[int]()
        for rank in range(sum(students[:node]), sum(students[:node]) + number):
            loader = TrainLoader(
                open_shards(config.data.train_folder),
                config.data,
                image_size=config.model.image_size,
                seed=config.train.seed,
                rank=rank,
                world_size=world_size,
                micro_batch_size=config.train.micro_batch_size,
                grad_accum_steps=accumulation,
            )
            steps = list(islice(loader._shards_of_steps(LoaderState()), loader.steps_per_epoch))
            epoch |= {shard for shards in steps for shard in shards}
            step |= set(steps[0])
        found.append((len(epoch), len(step)))
    return found


@pytest.mark.parametrize("students", [[2], [1, 1], [2, 1, 1]])
@pytest.mark.parametrize("order", ["full", "block"])
def test_each_node_reads_what_is_said(config: RunConfig, students: list[int], order: Literal["full", "block"]) -> None:
    config = replace(config, data=replace(config.data, order=order, block_window=1 if order == "block" else 16))
    expected = [
        f"reads {epoch} of 3 shards in the first epoch, {step} in the first step"
        for epoch, step in read_by_ranks(config, students)
    ]
    assert list(describe_shards(config, students)) == expected


@pytest.mark.lengthy
def test_memory_falls_with_the_schedule_and_counts_the_teacher(config: RunConfig) -> None:
    def total(config: RunConfig) -> float:
        number, unit = re.match(r"memory of a rank: ([\d.]+) (\w+)", describe_memory(config, 2)).groups()
        return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]

    plain = total(replace(config, memory=replace(config.memory, schedule="none")))
    assert total(config) < plain
    spec = "module:tests.distill.test_distill_runs:ten_classes"
    taught = replace(config, distill=replace(config.distill, teacher=spec))
    assert total(taught) > total(config)
