"""Where a teacher's network comes from: one loader per kind of spec."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from data_pipelines.user_functions import function_of_user
from sret_scale.distill import efficientnet_lite
from sret_scale.distill.spec import TeacherSpec

LoadRun = Callable[[Path], tuple[nn.Module, Sequence[float], Sequence[float], int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier with its own preprocessing: images in [0, 1] become (image - mean) / std at `image_size` pixels."""

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    interpolation: str = "bicubic"


def load_network(spec: TeacherSpec, *, num_classes: int, load_run: LoadRun) -> Network:
    """The network that a spec names. ValueError or OSError with what to do when there is none."""
    network = _loaded(spec, num_classes=num_classes, load_run=load_run)
    mean, std = spec.numbers("mean", network.mean), spec.numbers("std", network.std)
    # One number is that of all channels.
    mean, std = (numbers * (len(network.mean) if len(numbers) == 1 else 1) for numbers in (mean, std))
    if not len(mean) == len(std) == len(network.mean) or min(std) <= 0 or len(mean) not in (1, 3):
        raise ValueError(
            f"teacher {spec.text!r}: expected mean and std, above 0, of {len(network.mean)} channels (1 or 3), got "
            f"{mean} and {std}"
        )
    (size,) = spec.numbers("size", (network.image_size,))
    return dataclasses.replace(network, mean=mean, std=std, image_size=int(size))


def _loaded(spec: TeacherSpec, *, num_classes: int, load_run: LoadRun) -> Network:
    match spec.kind:
        case "run":
            return _from_parts(spec, load_run(Path(spec.value)))
        case "module":
            # The user's function returns it. Its code runs: this kind is for code that the user wrote or trusts.
            return _from_parts(spec, function_of_user(spec.value, f"teacher {spec.text!r}")())
        case "timm":
            return _from_timm(spec, num_classes)
        case "labels":
            raise ValueError(f"teacher {spec.text!r}: stored labels cannot answer about new images; name a network")
        case kind:
            module, image_size = efficientnet_lite.load_efficientnet_lite(kind)
            mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
            return Network(module=module, mean=mean, std=std, image_size=image_size)


def _from_timm(spec: TeacherSpec, num_classes: int) -> Network:
    # Importing timm takes seconds, which only this kind of teacher should cost.
    from sret_scale.timm import create_model, preprocessing

    file = spec.options.get("checkpoint")
    module = create_model(
        spec.value, num_classes=num_classes, checkpoint=Path(file) if file else None, channels=spec.channels
    )
    mean, std, image_size, interpolation = preprocessing(module)
    if spec.channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    # "random" means that the training drew one of both.
    interpolation = "bilinear" if interpolation == "bilinear" else "bicubic"
    return Network(module=module, mean=mean, std=std, image_size=image_size, interpolation=interpolation)


def _from_parts(spec: TeacherSpec, parts: object) -> Network:
    """A Network from (module, mean, std, image_size), which is what runs and the users' functions give."""
    if not isinstance(parts, tuple) or len(parts) != 4 or not isinstance(parts[0], nn.Module):
        raise ValueError(
            f"teacher {spec.text!r}: expected (torch.nn.Module, mean, std, image_size), got {type(parts).__name__}"
        )
    module, mean, std, image_size = parts
    return Network(module=module, mean=tuple(mean), std=tuple(std), image_size=int(image_size))
