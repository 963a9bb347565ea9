"""Slow and obvious: what a document costs, byte by byte, each read in a row of its own."""

import math

import torch

from sret_scale.model.text.next_byte import NextByte
from tests.reference.text_windows import windows_of


def bits_per_byte(model: NextByte, documents: list[bytes], carried: int) -> float:
    """By the probability of every byte from those before it in the first window that has it."""
    bits, num_bytes, context = 0.0, 0, model.config.context
    for document in documents:
        for before, new in windows_of(document, context, carried):
            for place in range(len(new)):
                known = [0, *before, *new[:place]]
                row = torch.tensor([known + [0] * (context + 1 - len(known))])
                scores = model.forward_head(model.forward_features(row))[0, len(known) - 1]
                bits -= math.log2(scores.double().softmax(0)[new[place]].item())
                num_bytes += 1
    return bits / num_bytes
