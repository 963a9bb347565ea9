"""Backbones: what tying does to ViT, Mixer and ResMLP, at equal applications and at equal multiply-adds.

    python experiments/backbones.py runs/backbones                  # the same command continues
    python experiments/backbones.py runs/backbones --table          # what there is, as Markdown

timm's own blocks, made recursive by `make_recursive`, on the Fashion-MNIST that is shipped (10,000 images to train on,
2,000 to test): 16 patches of 7 pixels, width 48, AdamW at 2e-3, 32,000 images in batches of 64 moved by up to 2 pixels
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
"""

import argparse
import csv
import gzip
import math
import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.memory.planning.costs import forward_flops
from sret_scale.timm import import_timm, make_recursive

LENGTH, WIDTH, BATCH, IMAGES, RATE, SHIFT = 6, 48, 64, 32_000, 2e-3, 2
BACKBONES, ARMS = ("vit", "mixer", "resmlp"), ("untied", "tied_projected", "tied", "deep")
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


def train(name: str, kind: str, seed: int) -> dict[str, object]:
    """One run, as a line of the table."""
    torch.manual_seed(seed)
    model, width = arm(name, kind)
    images, labels = split("train")
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer, steps, started = torch.optim.AdamW(groups, lr=RATE), IMAGES // BATCH, time.process_time()
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


def table(lines: list[dict[str, str]]) -> None:
    """Means and deviations over the seeds, and the difference to `untied` at the same seeds with its error."""
    print("| backbone | arm | width | parameters | MACs | top-1, % | against untied |\n|---|---|---|---|---|---|---|")
    for name in BACKBONES:
        of = {kind: [line for line in lines if (line["backbone"], line["arm"]) == (name, kind)] for kind in ARMS}
        first = {line["seed"]: float(line["accuracy"]) for line in of["untied"]}
        for kind, own in of.items():
            if len(own) < 1:
                continue
            found = [float(line["accuracy"]) for line in own]
            apart = [float(line["accuracy"]) - first[line["seed"]] for line in own if line["seed"] in first]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else math.nan
            spread = statistics.stdev(found) if len(found) > 1 else math.nan
            print(
                f"| {name} | {kind} | {own[0]['width']} | {int(own[0]['parameters']):,} | {int(own[0]['macs']):,} | "
                f"{statistics.mean(found):.2f} +- {spread:.2f} | {statistics.mean(apart):+.2f} +- {error:.2f} |"
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
        table(known)
        return
    done = {(line["backbone"], line["arm"], line["seed"]) for line in known}
    for seed in args.seeds:
        for name in BACKBONES:
            for kind in ARMS:
                if (name, kind, str(seed)) in done:
                    continue
                row = train(name, kind, seed)
                print(row, flush=True)
                with file.open("a", newline="") as stream:
                    writer = csv.DictWriter(stream, FIELDS)
                    if not stream.tell():
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
