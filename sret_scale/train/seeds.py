"""Seeds that are functions of their purpose and of a place in the run: nothing draws from a global generator."""

import numpy as np

from sret_scale.model import Noise
from sret_scale.model.noise import seed_sequence


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of its arguments."""
    return int(seed_sequence(purpose, *numbers).generate_state(1, np.uint64)[0] >> 1)


def noise_at(seed: int, step: int, micro_step: int, rank: int) -> Noise:
    """The seeds of one micro-batch of a rank: token orders are those of all ranks, masks of samples are its own."""
    return Noise(
        permutation_seed=derived_seed("permutation", seed, step),
        sample_seed=derived_seed("sample", seed, step, micro_step, rank),
    )
