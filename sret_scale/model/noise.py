"""Where a model's randomness comes from: token permutations, and the masks of stochastic depth.

Both are functions of a seed and a position, never of a global generator (unless the config asks for the reference's
`permutation="random"`), so a re-run of an application, another rank, or a resumed run gets the same ones.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sret_scale.model.config import StackConfig


@dataclass(frozen=True)
class Noise:
    """Seeds of a training step: permutations are the same on every rank, sample masks differ by rank and micro-step."""

    permutation_seed: int
    sample_seed: int


def seed_sequence(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """The one derivation of seeds from a purpose and a place in the run: nothing draws from a global generator."""
    return np.random.SeedSequence([int.from_bytes(purpose.encode(), "little"), *numbers])


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a function of its arguments."""
    return int(seed_sequence(purpose, *numbers).generate_state(1, np.uint64)[0] >> 1)


def noise_at(seed: int, step: int, micro_step: int, rank: int) -> Noise:
    """The seeds of one micro-batch of a rank: token orders are those of all ranks, masks of samples are its own."""
    return Noise(
        permutation_seed=derived_seed("permutation", seed, step),
        sample_seed=derived_seed("sample", seed, step, micro_step, rank),
    )


def seeded_generator(device: torch.device, purpose: str, *numbers: int) -> torch.Generator:
    """A generator on the device whose stream is a function of the purpose and the numbers."""
    # Another hash than `seed_sequence`'s, as runs of 0.1.0 have it: it gives way with the next change of format.
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class PermutationSource:
    """Draws the token permutations of one stage, `count` of them for one forward pass, on the tokens' device."""

    def __init__(self, config: StackConfig, stage_index: int) -> None:
        self.policy = config.permutation
        self.seed = config.permutation_seed
        self.stage_index = stage_index

    def __call__(self, noise: Noise | None, count: int, num_tokens: int, device: torch.device) -> Tensor:
        """(count, num_tokens) int64; row k belongs to the k-th application that is permuted."""
        if self.policy == "random":
            generator = None
        else:
            seed = self.seed if noise is None else noise.permutation_seed
            generator = seeded_generator(device, "permutation", seed, self.stage_index)
        return torch.rand(count, num_tokens, generator=generator, device=device).argsort(dim=1)


@dataclass(frozen=True)
class Dropout:
    """Dropout of one application: the k-th mask of a call is a function of the seeds and k, so a re-run repeats it."""

    rate: float
    seeds: tuple[int, ...]

    def masks(self, like: Tensor) -> Callable[[Sequence[int]], Tensor]:
        """Starts a call: a function from a shape to the next mask of 0 and 1 / (1 - rate), on the device of `like`."""
        generator = seeded_generator(like.device, "dropout", *self.seeds)
        keep = 1.0 - self.rate

        def draw(shape: Sequence[int]) -> Tensor:
            uniform = torch.rand(tuple(shape), generator=generator, device=like.device)
            return (uniform < keep).to(like.dtype) / keep

        return draw


def drop_path_masks(rates: Tensor, batch: int, noise: Noise, stage_index: int) -> Tensor:
    """(applications, 2, B, 1, 1) factors of attention and feed-forward: 0, or 1 / (1 - rate) to keep the mean.

    rates: (applications,) fp32, on the device where the masks are wanted.
    """
    generator = seeded_generator(rates.device, "drop path", noise.sample_seed, stage_index)
    uniform = torch.rand(len(rates), 2, batch, 1, 1, generator=generator, device=rates.device)
    keep = 1.0 - rates[:, None, None, None, None]
    return (uniform < keep).float() / keep
