"""Seeds that are functions of their purpose and of a place in the run: nothing draws from a global generator."""

import numpy as np


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of its arguments."""
    entropy = [int.from_bytes(purpose.encode(), "little"), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
