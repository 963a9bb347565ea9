"""Slices of flat gradients: one pass finds what comparing every chunk with every part finds."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sret_scale.train.engine.zero_layout import Part, slices


def slow_slices(chunks: list[Tensor], parts: list[Part]) -> list[tuple[str, list[float]]]:
    """Every chunk against every part, element by element."""
    found, start = [], 0
    for chunk in chunks:
        places = range(start, start + chunk.numel())
        for part in parts:
            mine = [float(place) for place in places if part.start <= place < part.start + part.length]
            if mine:
                found.append((part.name, mine))
        start += chunk.numel()
    return found


@example([0], [(0, 0)])
@example([3], [(1, 3)])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=8))
def test_one_pass_finds_every_slice(sizes: list[int], gaps_and_lengths: list[tuple[int, int]]) -> None:
    chunks = list(torch.split(torch.arange(float(sum(sizes))), sizes))
    parts, place = [], 0
    for number, (gap, length) in enumerate(gaps_and_lengths):
        parts.append(Part(name=str(number), start=place + gap, length=length))
        place += gap + length
    found = [(part.name, values.tolist()) for part, values in slices(chunks, parts)]
    assert found == slow_slices(chunks, parts)
