"""Transforms of a user, for the tests: in a module of their own, because worker processes import them by name."""

import os
import signal
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, Any]


def seeded_noise(image_CHW: Pixels, seed: int) -> Pixels:
    """Works in place, and holds the interpreter lock."""
    generator = np.random.default_rng(seed)
    for channel in image_CHW:
        channel[0, 0] = generator.integers(256)
    return image_CHW


def fails_on_grey_20(image_CHW: Pixels, seed: int) -> Pixels:
    if image_CHW[0, 1, 1] == 20:
        raise RuntimeError("no grey of 20")
    return image_CHW


def dies_on_grey_20(image_CHW: Pixels, seed: int) -> Pixels:
    if image_CHW[0, 1, 1] == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return image_CHW


def returns_floats(image_CHW: Pixels, seed: int) -> Pixels:
    return image_CHW / 255
