"""Samples with label maps and attributes: written, checked, streamed, mixed, resumed; refused where they are bad."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.grids.made import GridOptions
from data_pipelines.image.map_png import decode_map
from data_pipelines.shards.classes import renumbered
from data_pipelines.shards.index import ShardSet, open_shards
from data_pipelines.shards.mixture import mix_shards
from data_pipelines.stream.loader import Batch, DataConfig, LoaderState, TrainLoader, evaluation_batches
from data_pipelines.stream.reader import BadSampleError
from data_pipelines.upkeep.verify import verify_shards
from data_pipelines.writing.write import WriteConfig, write_shards
from tests.data.shard_sources import members_of

AS_STORED = DataConfig(crop="none", flip_rate=0.0)
MEMBERS = ("map.png", "distance.png", "before.png")


def make(folder: Path, *, shard_samples: int = 7, num_workers: int = 1, **options: Any) -> ShardSet:
    made = GridOptions(**{"puzzle": "reach", "count": 20, "smallest": 7, "largest": 11, "seed": 3, **options})
    write_shards(
        WriteConfig(kind="mazes", source=made, seed=None, shard_samples=shard_samples), folder, num_workers=num_workers
    )
    return open_shards(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make(tmp_path_factory.mktemp("mazes") / "set")


def loader(shards: ShardSet, **fields: Any) -> TrainLoader:
    return TrainLoader(shards, replace(AS_STORED, **fields), image_size=12, micro_batch_size=4, seed=5)


def evaluated(shards: ShardSet, batch_size: int = 6) -> list[Batch]:
    return list(evaluation_batches(shards, AS_STORED, image_size=12, batch_size=batch_size, rank=0, world_size=1))


def same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.images, other.images)
        assert one.maps.keys() == other.maps.keys() == {"map", "distance", "before"}
        assert all(torch.equal(one.maps[name], other.maps[name]) for name in one.maps)


def test_rows_have_what_the_tars_have_and_nothing_is_asked_around_it(shards: ShardSet) -> None:
    stored = {name: members_of(shards.folder, name) for name in MEMBERS}
    assert set(shards.members) == set(MEMBERS) and shards.manifest.members == list(MEMBERS)
    assert len(set(shards.width.tolist())) == 3
    rows = 0
    for batch in evaluated(shards):
        assert batch.maps["map"].dtype == torch.uint8 and batch.maps["distance"].dtype == torch.int32
        for row in range(int(batch.valid.sum())):
            index, side = int(batch.indices[row]), int(shards.width[batch.indices[row]])
            for name, around in (("map", 255), ("distance", 0), ("before", 0)):
                map_HW = batch.maps[name][row].clone()
                data = stored[f"{name}.png"][shards.key(index)]
                assert np.array_equal(map_HW[:side, :side], decode_map(data, f"{name}.png", side, side))
                map_HW[:side, :side] = around
                assert (map_HW == around).all()
            assert (batch.images[row, :, side:] == 0).all() and (batch.images[row, :, :, side:] == 0).all()
            assert batch.images[row, 0, :side, :side].any()
            rows += 1
        assert (batch.maps["map"][~batch.valid] == 255).all()
    assert rows == 20


@pytest.mark.multi_process
def test_threads_processes_and_a_resumed_run_give_the_same_rows(shards: ShardSet) -> None:
    steps = list(islice(loader(shards).steps(), 7))
    batches = [step.micro_batches[0] for step in steps]
    same(list(islice(loader(shards, worker_kind="processes", workers=1), 7)), batches)
    state = LoaderState.from_json(steps[2].next_state.to_json())
    same([step.micro_batches[0] for step in islice(loader(shards, workers=1).steps(state), 4)], batches[3:])


def test_sets_are_mixed_where_their_members_are_the_same(shards: ShardSet, tmp_path: Path) -> None:
    other = make(tmp_path / "other", count=6, seed=4)
    mixed = mix_shards([shards, other])
    same(
        evaluated(mixed, 1), [*evaluated(shards, 1), *(replace(b, indices=b.indices + 20) for b in evaluated(other, 1))]
    )
    with pytest.raises(
        ValueError, match=r"path: other members than .*: expected map\.png distance\.png before\.png, got"
    ):
        mix_shards([shards, replace_classes(make(tmp_path / "path", puzzle="path"), shards)])


def replace_classes(shards: ShardSet, like: ShardSet) -> ShardSet:
    return replace(shards, manifest=replace(shards.manifest, class_names=like.class_names))


def test_labels_of_pixels_are_not_renumbered(shards: ShardSet) -> None:
    assert renumbered(shards, ["unreached", "reached"], "run") is shards
    with pytest.raises(ValueError, match="other classes than run: class 0: expected 'reached', got 'unreached'"):
        renumbered(shards, ["reached", "unreached"], "run")


def damage(shards: ShardSet, target: Path, index: int, member: str) -> ShardSet:
    """A copy of the set with one byte of a member changed."""
    copy = make(target)
    place = int(copy.members[member].offset[index]) + int(copy.members[member].length[index]) - 20
    path = copy.folder / copy.shard_names[int(copy.shard_of[index])]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return copy


@pytest.mark.parametrize("member", MEMBERS)
def test_a_damaged_map_makes_its_sample_bad_by_name(shards: ShardSet, tmp_path: Path, member: str) -> None:
    broken = damage(shards, tmp_path / "set", 9, member)
    [finding] = verify_shards(broken.folder)
    assert (finding.key, finding.reason) == ("reach-000009", f"{member}: its bytes have changed")
    with pytest.raises(BadSampleError, match=rf"'reach-000009' at offset \d+: {member}: checksum .* have changed"):
        evaluated(broken)
    quarantine = tmp_path / "bad.jsonl"
    steps = loader(broken, max_bad_rate=0.2, quarantine_file=str(quarantine)).steps()
    rows = [step.micro_batches[0] for step in islice(steps, 5)]
    assert 9 not in torch.cat([batch.indices for batch in rows]).tolist()
    assert f'"reason": "{member}: checksum' in quarantine.read_text()


def test_views_that_would_part_image_and_map_are_refused(shards: ShardSet) -> None:
    for fields in ({"crop": "centre"}, {"flip_rate": 0.5}, {"transform": "a:b"}):
        with pytest.raises(
            ValueError, match=r"map\.png and .*: set data\.crop=none data\.flip_rate=0 data\.transform=null"
        ):
            loader(shards, **fields).steps()
    with pytest.raises(ValueError, match=r"set data\.crop=none"):
        next(evaluation_batches(shards, DataConfig(), image_size=12, batch_size=4, rank=0, world_size=1))
    with pytest.raises(ValueError, match=r"11 x 11 pixels do not fit into 9 x 9 .*: set model\.image_size=11"):
        next(evaluation_batches(shards, AS_STORED, image_size=9, batch_size=4, rank=0, world_size=1))
