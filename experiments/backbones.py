"""Backbones: what tying does to ViT, Mixer and ResMLP, at equal applications and at equal multiply-adds.

    python experiments/backbones.py runs/backbones                  # the same command continues
    python experiments/backbones.py runs/backbones --table          # what there is, as Markdown

timm's own blocks, made recursive by `make_recursive`, on the Fashion-MNIST that is shipped (10,000 images to train on,
2,000 to test): 16 patches of 7 pixels, width 48, AdamW at 2e-3, 64,000 images in batches of 64 moved by up to 2 pixels
and mirrored, the step size of a whole block 1. Arms, with L = 6 applications:

    untied         L blocks, each once
    tied_projected L/2 blocks, each twice in a row, the paper's projection behind every application
    tied           the same without projections
    deep           2L blocks, each once, of the width at which their multiply-adds come nearest to those of `untied`

What would refute it, written down before the runs. Claim A: tying without projections costs less than one point of
accuracy in all three backbones; refuted by a mean difference of -1 point or more in any. Claim B: projections give
back what tying costs; refuted where `tied_projected` lies below `tied` by more than the error of the difference.
Claim C: at equal multiply-adds depth gives nothing on this data; refuted where `deep` beats `untied` by more than
twice the error of the difference. A run is one line of FOLDER/runs.csv; with three seeds an error is a rough guess.

Tie, then heal: `untied` of the ViT, trained on 32,000 images (`trained`), becomes L/2 blocks used twice in a row. Their
weights are the mean (`mean`) of the two that become one, or the first of them (`first`), and trains on for 8,000 images
with the same warm-up and cosine (`mean_healed`, `first_healed`). Beside it the tied network from new weights: for the
images of the healing alone (`new`), and for those of both trainings together (`new_long`).

What would refute it, written down before these runs. Claim D: trained weights are worth something to the tied network;
refuted where `mean_healed` does not beat `new` by more than twice the error of the difference. Claim E: the mean is a
better start than the first; refuted where `mean` does not beat `first`, or `mean_healed` falls behind `first_healed`,
by more than the error of the difference. Claim F: healing costs nothing against training the tied network all along;
refuted where `mean_healed` lies below `new_long` by more than twice the error of the difference.
"""

import argparse
import copy
import csv
import gzip
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.memory.planning.costs import forward_flops
from sret_scale.timm import import_timm, make_recursive

LENGTH, WIDTH, BATCH, IMAGES, RATE, SHIFT = 6, 48, 64, 64_000, 2e-3, 2
BACKBONES, ARMS = ("vit", "mixer", "resmlp"), ("untied", "tied_projected", "tied", "deep")
FIRST_TRAINING, HEALING = 32_000, 8_000
HEALED = ("mean_healed", "trained", "mean", "first", "first_healed", "new", "new_long")
FIELDS = ("backbone", "arm", "seed", "width", "parameters", "macs", "accuracy", "loss", "seconds")


def split(name: str) -> tuple[Tensor, Tensor]:
    """(N, 1, 28, 28) normalised images and (N,) labels of "train" or "t10k"."""
    sample = files("data_pipelines") / "sample" / "fashion_mnist"
    images, labels = (
        np.frombuffer(gzip.decompress((sample / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8)
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels = torch.from_numpy(images[16:].reshape(-1, 1, 28, 28).astype(np.float32)) / 255
    return (pixels - 0.286) / 0.353, torch.from_numpy(labels[8:].astype(np.int64))


def backbone(name: str, width: int, depth: int) -> nn.Module:
    """timm's model for 28 pixels of one colour, 10 classes."""
    models = import_timm().models
    shared = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": width, "num_classes": 10}
    if name == "vit":
        return models.VisionTransformer(depth=depth, num_heads=2, class_token=False, global_pool="avg", **shared)
    mixer = models.mlp_mixer
    # LayerScale at timm's 1e-4 is for 24 blocks and 300 epochs.
    own = {"norm_layer": mixer.Affine, "mlp_ratio": 4}
    own["block_layer"] = lambda *args, **kwargs: mixer.ResBlock(*args, init_values=0.1, **kwargs)
    return models.MlpMixer(num_blocks=depth, **shared, **(own if name == "resmlp" else {}))


def macs(model: nn.Module) -> int:
    """Multiply-adds of one image."""
    return forward_flops(lambda: model.eval()(torch.zeros(1, 1, 28, 28))) // 2


def arm(name: str, kind: str) -> tuple[nn.Module, int]:
    """The model of an arm, and its width."""
    if kind == "deep":
        wanted = macs(backbone(name, WIDTH, LENGTH))
        width = min(range(16, WIDTH, 2), key=lambda one: abs(macs(backbone(name, one, 2 * LENGTH)) - wanted))
        return backbone(name, width, 2 * LENGTH), width
    model = backbone(name, WIDTH, LENGTH)
    if kind != "untied":
        projections = "per_application" if kind == "tied_projected" else "none"
        # Of the blocks that become one the first is taken: a mean of random weights would be smaller.
        make_recursive(model, num_blocks=LENGTH // 2, init="first", projections=projections)
    return model, WIDTH


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `SHIFT` pixels and mirrored or not."""
    count, padded = len(images), F.pad(images, [SHIFT] * 4, value=-0.286 / 0.353)
    top, left = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(28), left + torch.arange(28)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def fit(model: nn.Module, seed: int, count: int) -> None:
    """Trains on `count` images, drawn by the seed."""
    images, labels = split("train")
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, lr=RATE), count // BATCH
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(moved(images[chosen], generator)), labels[chosen])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def row(model: nn.Module, name: str, kind: str, seed: int, width: int, started: float) -> dict[str, object]:
    """What a model reads on the test images, as a line of the table."""
    images, labels = split("t10k")
    with torch.no_grad():
        scores = model.eval()(images)
    return {
        "backbone": name,
        "arm": kind,
        "seed": seed,
        "width": width,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": round(100 * float((scores.argmax(1) == labels).float().mean()), 2),
        "loss": round(float(F.cross_entropy(scores, labels)), 4),
        "seconds": round(time.process_time() - started, 1),
        "macs": macs(model),
    }


def train(name: str, kind: str, seed: int, count: int = IMAGES) -> tuple[nn.Module, dict[str, object]]:
    """A model of an arm, and its line."""
    torch.manual_seed(seed)
    (model, width), started = arm(name, kind), time.process_time()
    fit(model, seed, count)
    return model, row(model, name, kind, seed, width, started)


def heal(seed: int) -> Iterator[dict[str, object]]:
    """The lines of "tie, then heal"."""
    trained, line = train("vit", "untied", seed, FIRST_TRAINING)
    yield line | {"arm": "trained"}
    for init in ("mean", "first"):
        started, model = time.process_time(), copy.deepcopy(trained)
        make_recursive(model, num_blocks=LENGTH // 2, init=init)
        yield row(model, "vit", init, seed, WIDTH, started)
        fit(model, seed + 1000, HEALING)
        yield row(model, "vit", f"{init}_healed", seed, WIDTH, started)
    for kind, count in (("new", HEALING), ("new_long", FIRST_TRAINING + HEALING)):
        yield train("vit", "tied", seed, count)[1] | {"arm": kind}


def table(lines: list[dict[str, str]], backbones: Sequence[str], arms: Sequence[str]) -> None:
    """Means and deviations over the seeds, and the difference to the first arm at the same seeds with its error."""
    print(f"| backbone | arm | width | parameters | MACs | top-1, % | loss | against {arms[0]} |\n|{'---|' * 8}")
    for name in backbones:
        of = {kind: [line for line in lines if (line["backbone"], line["arm"]) == (name, kind)] for kind in arms}
        first = {line["seed"]: float(line["accuracy"]) for line in of[arms[0]]}
        for kind, own in of.items():
            if len(own) < 1:
                continue
            found = [float(line["accuracy"]) for line in own]
            apart = [float(line["accuracy"]) - first[line["seed"]] for line in own if line["seed"] in first]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else math.nan
            loss = statistics.mean(float(line["loss"]) for line in own)
            spread = statistics.stdev(found) if len(found) > 1 else math.nan
            print(
                f"| {name} | {kind} | {own[0]['width']} | {int(own[0]['parameters']):,} | {int(own[0]['macs']):,} | "
                f"{statistics.mean(found):.2f} +- {spread:.2f} | {loss:.3f} | "
                f"{statistics.mean(apart):+.2f} +- {error:.2f} |"
            )


def main() -> None:
    """Make the runs that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "runs.csv"
    known = list(csv.DictReader(file.open())) if file.exists() else []
    if args.table:
        table(known, BACKBONES, ARMS)
        table(known, ["vit"], HEALED)
        return
    done = {(line["backbone"], line["arm"], line["seed"]) for line in known}

    def keep(line: dict[str, object]) -> None:
        print(line, flush=True)
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            if not stream.tell():
                writer.writeheader()
            writer.writerow(line)

    for seed in args.seeds:
        for name in BACKBONES:
            for kind in ARMS:
                if (name, kind, str(seed)) not in done:
                    keep(train(name, kind, seed)[1])
        if ("vit", HEALED[-1], str(seed)) not in done:
            # All lines of a seed at once: a table with half of them could not be continued.
            for line in list(heal(seed)):
                keep(line)


if __name__ == "__main__":
    main()
