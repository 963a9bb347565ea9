"""Checks the model against golden outputs of the published code: `python -m checks.parity FILE`.

The file's format, and the formula that makes weights and inputs, are in `tests/golden/README.md`.
"""

import argparse
import sys
import zipfile
import zlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.model import PRESETS, Noise, SReT, preset
from sret_scale.model.stage import Stage
from sret_scale.model.vision.official import published_names

TOLERANCE = 1e-9
LABELS = (3, 977)
ENTRIES = frozenset(
    {
        "logits",
        "loss",
        "grad_names",
        "grad_norms",
        "state_names",
        "state_shapes",
        "input_seed",
        "image_size",
        "num_permutations",
    }
)


def formula_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that the golden files use for a published state-dict key."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    parent, _, kind = key.rpartition(".")
    if kind == "running_var":
        return 1 + 0.1 * np.abs(r)
    if kind == "running_mean":
        return 0.1 * r
    if parent.rpartition(".")[2].startswith("coefficient"):
        return 1 + 0.1 * r
    if key == "pos_embed":
        return 0.02 * r
    if kind == "weight" and len(shape) == 1:
        return 1 + 0.1 * r
    if kind == "bias":
        return 0.02 * r
    return r / np.sqrt(np.prod(shape[1:]))


class GoldenPermutations:
    """Permutations numbered through one forward pass, as the golden files draw them; `drawn` counts them."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, noise: Noise | None, count: int, num_tokens: int, device: torch.device) -> Tensor:
        rows = [np.random.RandomState(1000 + self.drawn + k).permutation(num_tokens) for k in range(count)]
        self.drawn += count
        return torch.from_numpy(np.stack(rows)).to(device)


def golden_model(name: str, golden: dict[str, np.ndarray]) -> SReT:
    """The preset of that name in float64 with the formula's weights; ValueError where keys or shapes differ."""
    image_size, num_classes = int(golden["image_size"]), golden["logits"].shape[1]
    model = SReT(preset(name, image_size=image_size, num_classes=num_classes)).double().eval()
    names = published_names(model.config)
    theirs = [str(key) for key in golden["state_names"]]
    if sorted(theirs) != sorted(names):
        missing, extra = sorted(set(theirs) - set(names)), sorted(set(names) - set(theirs))
        raise ValueError(f"state-dict keys differ: we lack {missing[:3]}, we add {extra[:3]}")
    state = model.state_dict()
    for key, text in zip(theirs, golden["state_shapes"], strict=True):
        shape = tuple(int(side) for side in str(text).split("x") if side)
        if tuple(state[names[key]].shape) != shape:
            raise ValueError(f"shape of {key} differs: golden {shape}, ours {tuple(state[names[key]].shape)}")
        # A shared tensor is listed once per loop: the last of its keys holds.
        state[names[key]] = torch.from_numpy(np.asarray(formula_value(key, shape)))
    model.load_state_dict(state, strict=True)
    return model


def differences(name: str, golden: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute differences of logits, loss and gradient norms; NaN where either side holds one.

    Raises ValueError or KeyError where the entries do not describe a run of this model.
    """
    model, logits, loss = computed(name, golden)
    return {
        "logits": largest_difference("logits", logits, golden["logits"]),
        "loss": largest_difference("loss", loss, golden["loss"]),
        "gradient norms": largest_difference("grad_norms", gradient_norms(model, golden), golden["grad_norms"]),
    }


def computed(name: str, golden: dict[str, np.ndarray]) -> tuple[SReT, np.ndarray, np.ndarray]:
    """The model with the gradients of its loss, its logits, and the loss, for the inputs that the entries describe."""
    model = golden_model(name, golden)
    draw = GoldenPermutations()
    for stage in model.stages:
        cast(Stage, stage).permutations = draw
    size = int(golden["image_size"])
    images = np.random.RandomState(int(golden["input_seed"])).standard_normal((2, 3, size, size))
    logits = model(torch.from_numpy(images))
    if draw.drawn != int(golden["num_permutations"]):
        raise ValueError(f"drew {draw.drawn} permutations, golden {int(golden['num_permutations'])}")
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    loss.backward()
    return model, logits.detach().numpy(), loss.detach().numpy()


def gradient_norms(model: SReT, golden: dict[str, np.ndarray]) -> np.ndarray:
    """L2 norms of the model's gradients in the golden order; ValueError where the parameters are not the same ones."""
    names, parameters = published_names(model.config), dict(model.named_parameters())
    wanted = [names.get(str(key), str(key)) for key in golden["grad_names"]]
    if sorted(wanted) != sorted(parameters):
        missing, extra = sorted(set(wanted) - set(parameters)), sorted(set(parameters) - set(wanted))
        raise ValueError(
            f"golden gradients of {len(wanted)} parameters, we have {len(parameters)}: "
            f"we lack {missing[:3]}, golden lacks {extra[:3]}"
        )
    norms = []
    for name in wanted:
        gradient = parameters[name].grad
        if gradient is None:
            raise ValueError(f"the loss gives {name} no gradient")
        norms.append(float(gradient.norm()))
    return np.array(norms)


def largest_difference(field: str, ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest absolute difference, NaN if there is one; ValueError where numpy would broadcast unequal shapes."""
    if ours.shape != golden.shape or golden.dtype.kind != "f":
        raise ValueError(f"golden {field} are {golden.dtype}{list(golden.shape)}, expected float64{list(ours.shape)}")
    return float(np.abs(ours - golden).max())


def load_golden(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Model name -> its entries; ValueError, OSError or BadZipFile for what is no golden file."""
    models: dict[str, dict[str, np.ndarray]] = {}
    # Opened here: numpy leaves a file open that it finds to be broken.
    with path.open("rb") as stream:
        file = np.load(stream)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, expected an .npz of MODEL/ENTRY arrays")
        for entry in file.files:
            name, _, field = entry.rpartition("/")
            models.setdefault(name, {})[field] = file[entry]
    if not models:
        raise ValueError("it holds no arrays")
    return models


def verdict(name: str, golden: dict[str, np.ndarray]) -> tuple[bool, str]:
    """Whether a model agrees, and the line that says so."""
    if name not in PRESETS:
        return False, "FAILED: no preset of this name"
    missing = sorted(ENTRIES - set(golden))
    if missing:
        return False, f"FAILED: the file lacks {', '.join(f'{name}/{field}' for field in missing)}"
    try:
        found = differences(name, golden)
    # numpy, torch and the model complain of a malformed entry in all of these.
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        return False, f"FAILED: {type(error).__name__}: {error}"
    # Every one by itself: max() drops a NaN that does not come first.
    agrees = all(value <= TOLERANCE for value in found.values())
    return agrees, " ".join(f"{value:>10.1e}" for value in found.values()) + ("   ok" if agrees else "   FAILED")


def main(argv: list[str] | None = None) -> int:
    """0 where every model agrees to 1e-9; 1 where one does not; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m checks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="golden file, for example tests/golden/sret_parity.npz")
    path = parser.parse_args(argv).file
    try:
        models = load_golden(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"error: cannot read golden outputs from {path}: {error}", file=sys.stderr)
        return 2
    num_agreeing = 0
    print(f"{'model':<24} {'logits':>10} {'loss':>10} {'gradients':>10}   (tolerance {TOLERANCE:g}, absolute)")
    for name, golden in models.items():
        agrees, text = verdict(name, golden)
        num_agreeing += agrees
        print(f"{name:<24} {text}")
    print(f"{num_agreeing} of {len(models)} models agree")
    return 0 if num_agreeing == len(models) else 1


if __name__ == "__main__":
    sys.exit(main())
