"""A trained model that answers for images of its user. B batch, C classes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from data_pipelines.checked_files import read_bounded
from data_pipelines.image.normalise import Normaliser
from data_pipelines.image.preprocessing import Preprocessing
from sret_scale.model import SReT
from sret_scale.model.vision.sret import as_sret
from sret_scale.train.load_run import WeightsKind, load_facts, load_trained

Answer = TypeVar("Answer")
Ranked = list[tuple[str, float]]
"""(name of a class, its probability), the most probable first."""

MAX_IMAGE_BYTES = 1 << 29
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model in evaluation mode on its device, what its scores are called, and how it wants its images."""

    model: SReT
    class_names: list[str]
    preprocessing: Preprocessing

    def predict(self, image: str | Path | bytes, *, top: int = 5) -> Ranked:
        """The `top` most probable classes of an image: a file, or its bytes. ValueError or OSError for what is none."""
        return self._ranked([self._pixels(image)], top)[0]

    def features(self, image: str | Path | bytes) -> Tensor:
        """(D,) what the head sees of an image: the mean of the last stage's tokens behind the norm, on the host.

        Raises ValueError or OSError for what is none.
        """
        return self._features([self._pixels(image)])[0]

    def features_of_files(
        self, files: Iterable[str | Path]
    ) -> Iterator[tuple[str | Path, Tensor | ValueError | OSError]]:
        """The same of many files, in their order, as `predict_files` has it."""
        return self._answers(files, self._features)

    def predict_files(
        self, files: Iterable[str | Path], *, top: int = 5
    ) -> Iterator[tuple[str | Path, Ranked | ValueError | OSError]]:
        """The same of many files, in their order: each with its classes, or with why it could not be read."""
        return self._answers(files, lambda images: self._ranked(images, top))

    def _answers(
        self, files: Iterable[str | Path], answer: Callable[[list[Tensor]], Iterable[Answer]]
    ) -> Iterator[tuple[str | Path, Answer | ValueError | OSError]]:
        waiting = iter(files)
        with ThreadPoolExecutor() as threads:
            while batch := list(islice(waiting, _BATCH_SIZE)):
                read = list(threads.map(self._pixels_or_error, batch))
                good = [pixels for pixels in read if isinstance(pixels, Tensor)]
                answers = iter(answer(good) if good else ())
                for file, found in zip(batch, read, strict=True):
                    yield file, next(answers) if isinstance(found, Tensor) else found

    @torch.inference_mode()
    def probabilities(self, images_BCHW: Tensor) -> Tensor:
        """(B, C) of uint8 pixels (B, 3, crop, crop), such as `preprocessing.pixels` gives."""
        scores_BC: Tensor = self.model(self._input(images_BCHW))
        return scores_BC.softmax(dim=1)

    def _input(self, images_BCHW: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return Normaliser(self.preprocessing.mean, self.preprocessing.std)(images_BCHW.to(device))

    @torch.inference_mode()
    def _features(self, images: list[Tensor]) -> Tensor:
        tokens_BDHW = self.model.forward_features(self._input(torch.stack(images)))
        return self.model.forward_head(tokens_BDHW, pre_logits=True).cpu()

    def _ranked(self, images: list[Tensor], top: int) -> list[Ranked]:
        best = self.probabilities(torch.stack(images)).topk(min(top, len(self.class_names)), dim=1)
        return [
            [(self.class_names[index], value) for index, value in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _pixels(self, image: str | Path | bytes) -> Tensor:
        return self.preprocessing.pixels(
            image if isinstance(image, bytes) else read_bounded(Path(image).expanduser(), MAX_IMAGE_BYTES)
        )

    def _pixels_or_error(self, image: str | Path) -> Tensor | ValueError | OSError:
        try:
            return self._pixels(image)
        except (ValueError, OSError) as error:
            return error


def load(source: str | Path, weights: WeightsKind | None = None) -> TrainedModel:
    """The model of a run's folder, one of its checkpoints, or exported safetensors; on the GPU where there is one.

    weights: of a run or checkpoint; by default the moving average where one is kept. Classes without names are called
    by their numbers. Raises ValueError or OSError for anything else, and for a model that does not classify images.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such run folder, checkpoint or file of safetensors")
    facts, model = load_facts(source), as_sret(load_trained(source, weights), str(source))
    if "preprocessing" not in facts:
        raise ValueError(
            f"{source} does not say how its images are prepared, as files of version 0.1.0 do not: give the folder of "
            "the run, or write the file again from there"
        )
    preprocessing, config = Preprocessing(**facts["preprocessing"]), model.config
    names = facts.get("class_names") or [str(index) for index in range(config.num_classes)]
    if config.head != "classes" or (preprocessing.crop, len(names)) != (config.image_size, config.num_classes):
        raise ValueError(
            f"{source}: expected a model that classifies images of {preprocessing.crop} pixels into {len(names)} "
            f"classes, got one of {config.image_size} pixels and {config.num_classes} {config.head}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainedModel(model=model.to(device), class_names=names, preprocessing=preprocessing)
