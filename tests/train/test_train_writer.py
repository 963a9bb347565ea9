"""Saves beside the training: what is saved is the state at the call, one save at a time, and no failure is lost."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sret_scale.runs.checkpoint import list_checkpoints, read_tensors, save_checkpoint
from sret_scale.train import checkpoint_writer as writer_module
from sret_scale.train.checkpoint_writer import CheckpointWriter
from sret_scale.train.engine.snapshot import RankTensor, Snapshot, WholeTensor
from tests.ranks.save_once import MAIN


def rank_tensor(values: Tensor, name: str = "a") -> RankTensor:
    return RankTensor(
        values=values, is_fragment=False, wholes=(WholeTensor(set_name="weights", name=name, shape=values.shape),)
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until it is set."""
    gate = threading.Event()

    def slow_save(*arguments: object, **options: object) -> Path:
        assert gate.wait(20)
        return save_checkpoint(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "save_checkpoint", slow_save)
    yield gate
    gate.set()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, gate: threading.Event) -> None:
    values, count = torch.arange(12.0).view(3, 4), torch.tensor(3)
    with CheckpointWriter(tmp_path, MAIN, keep=2) as writer:
        writer.start([rank_tensor(values), rank_tensor(count, "count")], step=1, state={})
        values.mul_(-1)
        count.add_(1)
        assert list_checkpoints(tmp_path) == []
        gate.set()
        writer.start([rank_tensor(values), rank_tensor(count, "count")], step=2, state={})
    newest, oldest = list_checkpoints(tmp_path)
    assert torch.equal(read_tensors(oldest, "weights")["a"], torch.arange(12.0).view(3, 4))
    assert torch.equal(read_tensors(newest, "weights")["a"], values)
    assert [int(read_tensors(path, "weights")["count"]) for path in (oldest, newest)] == [3, 4]


def test_one_save_is_under_way_at_most(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointWriter(tmp_path, MAIN, keep=1) as writer:
        writer.start([rank_tensor(torch.zeros(2))], step=1, state={})
        threading.Timer(0.2, gate.set).start()
        writer.start([rank_tensor(torch.zeros(2))], step=2, state={})
        # The buffer is free again, because the save before is committed.
        assert [path.name for path in list_checkpoints(tmp_path)][-1] == "step-000000001"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000002"]


def test_a_failed_save_is_raised_at_the_next_occasion_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file is in the way")
    with pytest.raises(OSError, match="cannot save checkpoint") as raised, CheckpointWriter(folder, MAIN, keep=1) as w:
        w.start([rank_tensor(torch.zeros(2))], step=1, state={})
        with pytest.raises(OSError, match=r"step-000000001 \(8 bytes of tensors\)"):
            w.wait()
        assert w.has_failed
        with pytest.raises(OSError, match="cannot save"):
            w.start([rank_tensor(torch.zeros(2))], step=2, state={})
    assert raised.value.errno == errno.EEXIST


def test_another_error_of_the_run_is_not_hidden_by_the_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file is in the way")
    with pytest.raises(ArithmeticError, match="diverged"), CheckpointWriter(folder, MAIN, keep=1) as writer:
        writer.start([rank_tensor(torch.zeros(2))], step=1, state={})
        raise ArithmeticError("diverged")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 3))
def test_fragments_of_all_ranks_become_the_whole_that_was_cut(sizes: list[int], world_size: int, padding: int) -> None:
    """Cut as ZeRO cuts: tensors end to end with gaps, padded to equal fragments."""
    wholes = [torch.rand(size, 2) for size in sizes]
    starts, flat = [], torch.empty(0)
    for whole in wholes:
        starts.append(flat.numel())
        flat = torch.cat([flat, whole.flatten(), torch.full((padding,), torch.nan)])
    flat = torch.cat([flat, torch.full((-flat.numel() % world_size,), torch.nan)])
    described = tuple(
        WholeTensor(set_name="optimizer", name=str(index), shape=whole.shape, start=start)
        for index, (whole, start) in enumerate(zip(wholes, starts, strict=True))
    )
    extra = torch.rand(3)
    snapshots = [Snapshot(is_main=rank == 0) for rank in range(world_size)]
    for snapshot, fragment in zip(snapshots, flat.chunk(world_size), strict=True):
        # The whole tensor stands first, so that the snapshot has to put the fragments in front of it.
        snapshot.take([rank_tensor(extra), RankTensor(values=fragment, is_fragment=True, wholes=described)])
    # What each rank would send.
    sent: list[Tensor] = []
    for snapshot in reversed(snapshots):

        def gathered(fragment: Tensor) -> list[Tensor]:
            sent.insert(0, fragment)
            return list(sent)

        sets = snapshot.whole(gathered)
    assert torch.equal(sets["weights"]["a"], extra)
    for index, whole in enumerate(wholes):
        assert torch.equal(sets["optimizer"][str(index)], whole)
    assert all(snapshot.whole(lambda _part: []) == {} for snapshot in snapshots[1:])
