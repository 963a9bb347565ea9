"""Batches of bytes to normalised floats: the bits of torch's arithmetic, in memory that is used again, never shared."""

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipelines.image.augment import normalise
from data_pipelines.image.batch_memory import Recycler
from data_pipelines.image.native import library as roi
from data_pipelines.image.normalise import Normaliser
from data_pipelines.stream.prefetch import empty_batch
from sret_scale.config.recipes import NO_AUGMENTATION
from sret_scale.config.run_config import RunConfig
from sret_scale.tasks.classification import Classification

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("is_built", [True, False])
def test_the_bits_are_those_of_torch(is_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_built:
        monkeypatch.setattr(roi, "_library", lambda: None)
    images_BCHW = torch.randint(0, 256, (5, 3, 17, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normaliser = Normaliser(MEAN, STD)
    for part_BCHW in (images_BCHW, images_BCHW[:, :, ::2], images_BCHW[:0], images_BCHW[1:2, :, :1, :1]):
        assert torch.equal(normaliser(part_BCHW), normalise(part_BCHW.float() / 255, MEAN, STD))


def test_training_and_evaluation_have_one_way_from_pixels_to_inputs() -> None:
    """Without augmentation both are the bits of one normaliser; with it, floats take torch's arithmetic."""
    images_BCHW = torch.randint(0, 256, (5, 3, 17, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = replace(empty_batch(np.arange(5), (3, 8, 8), Recycler(), pin_memory=False), images=images_BCHW)
    plain, cpu = Classification(replace(RunConfig(), augment=NO_AUGMENTATION)), torch.device("cpu")
    assert torch.equal(plain.inputs(batch, seed=0, device=cpu).model_input, plain.evaluation_input(batch, cpu))
    unit_BCHW = images_BCHW.float() / 255
    assert torch.equal(Normaliser(MEAN, STD)(unit_BCHW.clone()), normalise(unit_BCHW, MEAN, STD))


def test_memory_comes_back_only_when_nothing_uses_it() -> None:
    recycler = Recycler()
    first = recycler.take((4, 6), torch.float32)
    place = first.data_ptr()
    view, array = first[1:2], first.numpy()[2]
    first.fill_(7)
    del first
    for user in ("view", "array"):
        other = recycler.take((4, 6), torch.float32)
        assert other.data_ptr() != place
        other.fill_(0)
        assert bool((view == 7).all()) and (array == 7).all()
        if user == "view":
            del view
            view = torch.full((1,), 7.0)
    del array
    gc.collect()
    places = {recycler.take((24,), torch.float32).data_ptr() for _ in range(3)}
    assert place in places
    # Other numbers of bytes have memory of their own.
    assert recycler.take((3,), torch.uint8).shape == (3,) and recycler.take((0, 3), torch.uint8).shape == (0, 3)


def test_autograd_keeps_what_it_needs() -> None:
    recycler = Recycler()
    weight = torch.ones(8, requires_grad=True)
    loss = (recycler.take((8,), torch.float32).fill_(3) * weight).sum()
    recycler.take((8,), torch.float32).fill_(5)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0] * 8


def test_threads_never_share_memory() -> None:
    recycler, wrong = Recycler(), []

    def use(number: int) -> None:
        for _ in range(300):
            tensor = recycler.take((64,), torch.int64).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # A thread takes the next before it gives up the last.
    assert sum(len(free) for free in recycler._free.values()) <= 2 * 4
