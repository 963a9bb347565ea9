"""Fragments of flat gradients: one pass finds what comparing every tensor with every fragment finds."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sret_scale.train.engine.zero_layout import Fragment, fragment_views


def slow_views(tensors: list[Tensor], fragments: list[Fragment]) -> list[tuple[str, list[float]]]:
    """Every tensor against every fragment, element by element."""
    found, start = [], 0
    for tensor in tensors:
        places = range(start, start + tensor.numel())
        for fragment in fragments:
            mine = [float(place) for place in places if fragment.start <= place < fragment.start + fragment.length]
            if mine:
                found.append((fragment.name, mine))
        start += tensor.numel()
    return found


@example([0], [(0, 0)])
@example([3], [(1, 3)])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=8))
def test_one_pass_finds_every_fragment(sizes: list[int], gaps_and_lengths: list[tuple[int, int]]) -> None:
    tensors = list(torch.split(torch.arange(float(sum(sizes))), sizes))
    fragments, place = [], 0
    for number, (gap, length) in enumerate(gaps_and_lengths):
        fragments.append(Fragment(name=str(number), start=place + gap, length=length))
        place += gap + length
    found = [(fragment.name, values.tolist()) for fragment, values in fragment_views(tensors, fragments)]
    assert found == slow_views(tensors, fragments)
