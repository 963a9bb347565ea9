"""Grids: an image in, a label for every token out. B batch, C classes, H and W sides of the grid.

Shards carry the labels as `map`, 255 where nothing is asked, and may carry attributes of every token beside it, such as
its distance from a source: whole numbers, by which the loss may wait and accuracy is told apart. Whole images are seen,
in training in one of their eight symmetries; `augment` and the crops of `data` are of classification.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.grids.mazes import UNREACHED
from data_pipelines.image.map_png import IGNORED
from data_pipelines.image.normalise import Normaliser
from data_pipelines.keyed_random import keyed_words
from data_pipelines.stream.loader import Batch
from sret_scale.config.run_config import RunConfig
from sret_scale.model import SReTConfig
from sret_scale.model.upload import uploaded
from sret_scale.tasks.task import Inputs

NUM_BINS = 17
"""Of an attribute: 0 and 1, from 2, from 4 and so on in powers of two, and at last `UNREACHED`."""


class Grid:
    """Implements `task.Task`. The target is (B, 2, H, W): labels and the attribute that the loss waits for."""

    unit = "images"
    best = "exact"
    best_in_words = "exact match"

    def __init__(self, config: RunConfig) -> None:
        check_grid(config)
        self._config, self._num_classes = config, config.model.num_classes
        self._normalise = Normaliser(config.train.image_mean, config.train.image_std)

    def inputs(self, batch: Batch, *, seed: int, device: torch.device) -> Inputs:
        """Each sample in a symmetry that its index and view number draw, whatever batch and rank it is in."""
        drawn = zip(batch.view_numbers.tolist(), batch.indices.tolist(), strict=True)
        numbers_B = torch.tensor(
            [int(keyed_words(1, "symmetry", self._config.train.seed, *sample)[0]) % 8 for sample in drawn]
        )
        images_BCHW, label_BHW, grid = batch.images.clone(), self._labels(batch), self._config.grid
        waits_BHW = (
            torch.zeros_like(label_BHW) if grid.ask_within is None else attribute_of(batch, grid.ask_by, "ask_by")
        )
        target_B2HW = torch.stack([label_BHW, waits_BHW], dim=1)
        for number in range(1, 8):
            rows_B = numbers_B == number
            images_BCHW[rows_B] = symmetric(images_BCHW[rows_B], number)
            target_B2HW[rows_B] = symmetric(target_B2HW[rows_B], number)
        return Inputs(model_input=self._normalise(images_BCHW.to(device)), target=target_B2HW.to(device))

    def loss(self, scores: Tensor, inputs: Inputs, *, progress: float, loops: int, part: slice = slice(None)) -> Tensor:
        """The mean cross-entropy of scores (B, C, H, W) over the tokens that are asked for after so many loops."""
        label_BHW, waits_BHW = inputs.target[part].unbind(1)
        if (within := self._config.grid.ask_within) is not None:
            is_early_BHW = (waits_BHW > within * loops) & (waits_BHW < UNREACHED)
            label_BHW = label_BHW.masked_fill(is_early_BHW, IGNORED)
        smoothing = self._config.distill.label_smoothing
        total = F.cross_entropy(
            scores.float(), label_BHW, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        return total / (label_BHW != IGNORED).sum().clamp(min=1)

    def added_loss(self, *, progress: float) -> None:
        """None: a grid has no teacher."""

    def evaluation_input(self, batch: Batch, device: torch.device) -> Tensor:
        return self._normalise(batch.images.to(device, non_blocking=True))

    def counts(self, scores: Tensor, batch: Batch) -> Tensor:
        """Samples, exact ones, tokens, their summed cross-entropy; tokens by class and right ones, by bin likewise."""
        label_BN, valid_B = self._labels(batch).flatten(1).to(scores.device), uploaded(batch.valid, scores.device)
        scores_BCN = scores.flatten(2)
        is_asked_BN = label_BN != IGNORED
        right_BN = (scores_BCN.argmax(dim=1) == label_BN) & is_asked_BN
        loss_BN = F.cross_entropy(scores_BCN, label_BN, ignore_index=IGNORED, reduction="none")
        exact_B = (right_BN == is_asked_BN).all(dim=1)
        whole_B4 = torch.stack([valid_B, exact_B, is_asked_BN.sum(1), loss_BN.double().sum(1)], dim=1)
        own_BCN = F.one_hot(label_BN.clamp(max=self._num_classes), self._num_classes + 1)[..., :-1].transpose(1, 2)
        groups_BGN = own_BCN
        if (name := self._config.grid.bins) is not None:
            bin_BN = bins(attribute_of(batch, name, "bins")).flatten(1).to(scores.device)
            groups_BGN = torch.cat([own_BCN, F.one_hot(bin_BN, NUM_BINS).transpose(1, 2) * is_asked_BN[:, None]], dim=1)
        split_BG2 = torch.stack([groups_BGN.sum(2), (groups_BGN * right_BN[:, None]).sum(2)], dim=2)
        # What a padded row gives may be no number.
        return torch.where(valid_B[:, None], torch.cat([whole_B4, split_BG2.flatten(1)], dim=1).double(), 0.0)

    def numbers(self, counts: list[float]) -> dict[str, float]:
        """Exact match of whole images, balanced accuracy and loss of tokens, accuracy in each bin that has a token."""
        samples, exact, tokens, loss, *rest = counts
        groups = list(zip(rest[::2], rest[1::2], strict=True))
        classes, binned = groups[: self._num_classes], groups[self._num_classes :]
        recalls = [right / number for number, right in classes if number]
        name = self._config.grid.bins
        names = [f"{name}_{2**i if i else 0}_{2 ** (i + 1) - 1}" for i in range(NUM_BINS - 1)] + [f"{name}_none"]
        return {
            "exact": exact / samples,
            "balanced": sum(recalls) / max(1, len(recalls)),
            "loss": loss / max(1, tokens),
            **{name: right / number for name, (number, right) in zip(names, binned, strict=False) if number},
        }

    def _labels(self, batch: Batch) -> Tensor:
        """(B, H, W) int64 of a batch, checked."""
        if "map" not in batch.maps:
            raise ValueError(
                "task=grid: these shards have images and no maps: expected a label for every pixel, in a member `map` "
                "beside each image; write such shards, or use task=classification"
            )
        label_BHW = batch.maps["map"].long()
        is_wrong_BHW = (label_BHW >= self._num_classes) & (label_BHW != IGNORED)
        if is_wrong_BHW.any():
            row = int(is_wrong_BHW.flatten(1).any(dim=1).nonzero()[0])
            raise ValueError(
                f"sample {int(batch.indices[row])}: expected labels of 0 to {self._num_classes - 1} in its map, or "
                f"{IGNORED} where nothing is asked, got {int(label_BHW[is_wrong_BHW][0])}: set model.num_classes"
            )
        return label_BHW


def attribute_of(batch: Batch, name: str, field: str) -> Tensor:
    """(B, H, W) int64. ValueError where the shards lack what a field of the configuration names."""
    if name not in batch.maps:
        known = ", ".join(sorted(set(batch.maps) - {"map"})) or "none"
        raise ValueError(f"grid.{field}={name}: these shards lack this attribute of tokens, they have: {known}")
    return batch.maps[name].long()


def symmetric(x_HW: Tensor, number: int) -> Tensor:
    """One of the eight symmetries of a square, by number, of the last two dimensions; 0 leaves all as it is."""
    if number & 1:
        x_HW = x_HW.transpose(-1, -2)
    return x_HW.flip([-1 - axis for axis in (0, 1) if number & (2 << axis)])


def bins(attribute: Tensor) -> Tensor:
    """The number of the bin of every value, int64; see `NUM_BINS`."""
    edges = torch.tensor([*(2**power for power in range(1, NUM_BINS - 1)), UNREACHED], device=attribute.device)
    return (attribute[..., None] >= edges).sum(dim=-1)


def check_grid(config: RunConfig) -> None:
    """ValueError unless the model labels every token of the whole image, and nobody teaches it."""
    model = config.images
    if model.head != "tokens":
        raise ValueError(f"task=grid needs a label for every token: set model.head=tokens, got {model.head}")
    if isinstance(model, SReTConfig) and model.grids[-1] != model.image_size:
        raise ValueError(
            f"task=grid: expected a token a pixel, got {model.grids[-1]} tokens a side of {model.image_size} pixels: "
            "use one stage, and model.stem_strides=[1,1,1]"
        )
    if config.distill.teacher is not None:
        raise ValueError(f"task=grid has no teacher: set distill.teacher=null, got {config.distill.teacher}")
