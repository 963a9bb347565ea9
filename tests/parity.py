"""Checks the model against golden outputs of the published code: `python -m tests.parity tests/golden/sret_parity.npz`.

The file's format, and the formula that makes weights and inputs, are in `tests/golden/README.md`.
"""

import argparse
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sret_scale.model import PRESETS, Noise, SReT, preset
from sret_scale.model.official import published_names

TOLERANCE = 1e-9
LABELS = (3, 977)


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


def golden_permutations() -> Callable[[Noise | None, int, int, torch.device], Tensor]:
    """Permutations numbered through one forward pass, as the golden files draw them."""
    drawn = 0

    def draw(noise: Noise | None, count: int, num_tokens: int, device: torch.device) -> Tensor:
        nonlocal drawn
        rows = [np.random.RandomState(1000 + drawn + k).permutation(num_tokens) for k in range(count)]
        drawn += count
        draw.drawn = drawn  # type: ignore[attr-defined]
        return torch.from_numpy(np.stack(rows)).to(device)

    return draw


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
    """Largest absolute difference of logits, loss and gradient norms (relative where a norm is above 1)."""
    model = golden_model(name, golden)
    draw = golden_permutations()
    for stage in model.stages:
        stage.permutations = draw
    size = int(golden["image_size"])
    images = np.random.RandomState(int(golden["input_seed"])).standard_normal((2, 3, size, size))
    logits = model(torch.from_numpy(images))
    drawn = getattr(draw, "drawn", 0)
    if drawn != int(golden["num_permutations"]):
        raise ValueError(f"drew {drawn} permutations, golden {int(golden['num_permutations'])}")
    loss = F.cross_entropy(logits, torch.tensor(LABELS))
    loss.backward()
    names, parameters = published_names(model.config), dict(model.named_parameters())
    norms = np.array([float(parameters[names[str(key)]].grad.norm()) for key in golden["grad_names"]])  # type: ignore[union-attr]
    if len(norms) != len(parameters):
        raise ValueError(f"golden gradients of {len(norms)} parameters, we have {len(parameters)}")
    grad_error = np.abs(norms - golden["grad_norms"]) / np.maximum(1.0, golden["grad_norms"])
    return {
        "logits": float(np.abs(logits.detach().numpy() - golden["logits"]).max()),
        "loss": abs(float(loss.detach()) - float(golden["loss"])),
        "gradient norms": float(grad_error.max()),
    }


def load_golden(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Model name -> its entries."""
    models: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as file:
        for entry in file.files:
            name, _, field = entry.rpartition("/")
            models.setdefault(name, {})[field] = file[entry]
    if not models:
        raise ValueError(f"{path} holds no golden outputs")
    return models


def main(argv: list[str] | None = None) -> int:
    """0 where every model agrees to 1e-9; 1 where one does not; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="golden file, for example tests/golden/sret_parity.npz")
    path = parser.parse_args(argv).file
    try:
        models = load_golden(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: cannot read golden outputs: {error}", file=sys.stderr)
        return 2
    failed = 0
    print(f"{'model':<24} {'logits':>10} {'loss':>10} {'gradients':>10}   (tolerance {TOLERANCE:g})")
    for name, golden in models.items():
        if name not in PRESETS:
            print(f"{name:<24} FAILED: no preset of this name")
            failed += 1
            continue
        try:
            found = differences(name, golden)
        except (ValueError, KeyError) as error:
            print(f"{name:<24} FAILED: {error}")
            failed += 1
            continue
        # `not <=` so that a NaN fails.
        bad = not max(found.values()) <= TOLERANCE
        failed += bad
        print(f"{name:<24} " + " ".join(f"{v:>10.1e}" for v in found.values()) + ("   FAILED" if bad else "   ok"))
    print(f"{len(models) - failed} of {len(models)} models agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
