"""Coordinate check of branch schemes over depth: `python -m benchmarks.signal`.

A scheme is good if one learning rate fits every depth: after the same Adam steps the change of the scores and the RMS
of the stages stay within a factor of 2 from 20 to 1000 applications, while the branches still contribute (a scheme that
switches depth off would win every other column). A toy: blocks 2-5-3 of widths 16/32/64 on the sample data's images,
shrunk to 16 pixels, a new batch every step. With --out, rows are added to those of earlier calls.
"""

import argparse
import gzip
import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model import Noise, SReT, SReTConfig, preset

# Applications -> loops per stage, for blocks 2-5-3.
LOOPS = {20: (2, 2, 2), 108: (12, 12, 8), 300: (30, 33, 25), 1000: (115, 130, 40)}
WIDTHS, IMAGE_SIZE = (16, 32, 64), 16
PLACEMENTS = ("subln", "deepnorm", "deeploop")
SCHEMES = ("published", "inv_sqrt", "loop_aware", "layerscale", "rezero", *PLACEMENTS)
# What passes: largest over smallest of each column over the depths, and the least that the branches of a stage add.
LARGEST_RATIO, CONTRIBUTION_FLOOR = 2.0, 0.5


def config_at(depth: int, scheme: str, skip: str, projections: str) -> SReTConfig:
    """The toy model at a depth; a norm placement's name stands for that placement."""
    base = preset("demo_control_20")
    if scheme in PLACEMENTS:
        options = {"norm_placement": scheme, "branch_scheme": "loop_aware" if scheme == "subln" else "published"}
    else:
        options = {"branch_scheme": scheme}
    toy = {"num_heads": 2, "groups": (1,), "skip": skip, "projections": projections}
    stages = tuple(
        replace(stage, width=width, num_loops=loops, **toy, **options)
        for stage, width, loops in zip(base.stages, WIDTHS, LOOPS[depth], strict=True)
    )
    return replace(base, stages=stages, image_size=IMAGE_SIZE)


def sample_images(count: int) -> tuple[Tensor, Tensor]:
    """The first training images of the sample data, (count, 3, 16, 16) of mean 0 and deviation 1, and their labels."""
    folder = files("data_pipelines") / "sample" / "fashion_mnist"
    pixels, labels = (
        gzip.decompress((folder / f"train-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    images = torch.tensor(list(pixels[16 : 16 + count * 28 * 28]), dtype=torch.float32).view(count, 1, 28, 28)
    images = F.interpolate(images, size=IMAGE_SIZE, mode="area").expand(-1, 3, -1, -1)
    return (images - images.mean()) / images.std(), torch.tensor(list(labels[8 : 8 + count]))


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().square().mean().sqrt())


def check(config: SReTConfig, *, lr: float, report_steps: tuple[int, ...], batch: int) -> list[dict[str, Any]]:
    """One row per reported step: change of scores, RMS and contribution of each stage, loss, on a batch kept aside."""
    torch.manual_seed(0)
    model = SReT(config)
    model.stem.eval()
    images_BCHW, labels_B = sample_images(batch * (report_steps[-1] + 1))
    kept_BCHW, kept_B = images_BCHW[:batch], labels_B[:batch]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    first_BC = model(kept_BCHW, Noise(0, 0)).detach()
    rows = []
    for step in range(1, report_steps[-1] + 1):
        part = slice(step * batch, (step + 1) * batch)
        loss = F.cross_entropy(model(images_BCHW[part], Noise(step, step)), labels_B[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(float(loss.detach())):
            return [*rows, {"step": step, "loss": "not finite"}]
        if step in report_steps:
            rows.append({"step": step, **_measured(model, kept_BCHW, first_BC, kept_B)})
    return rows


@torch.no_grad()
def _measured(model: SReT, images_BCHW: Tensor, first_BC: Tensor, labels_B: Tensor) -> dict[str, Any]:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    hooks = [stage.register_forward_hook(note) for stage in model.stages]
    logits_BC = model(images_BCHW, Noise(0, 0))
    for hook in hooks:
        hook.remove()
    return {
        "logit_change": rms(logits_BC - first_BC),
        "stage_rms": [rms(x) for x in outputs],
        # What the branches of a stage add, against what came in.
        "contribution": [rms(after - before) / rms(before) for before, after in zip(inputs, outputs, strict=True)],
        "loss": float(F.cross_entropy(logits_BC, labels_B)),
    }


def verdict(results: list[dict[str, Any]], scheme: str, lr: float, step: int) -> dict[str, Any] | None:
    """Spread over the depths that were run at this rate and step, and whether the scheme passes; None for one depth."""
    found = {
        result["applications"]: row
        for result in results
        for row in result["rows"]
        if (result["scheme"], result["lr"], row["step"]) == (scheme, lr, step)
    }
    if len(found) < 2:
        return None
    depths = sorted(found)
    if any(row["loss"] == "not finite" for row in found.values()):
        return {"scheme": scheme, "step": step, "depths": depths, "passes": False}
    columns = [[row["logit_change"] for row in found.values()]]
    columns += [[row["stage_rms"][stage] for row in found.values()] for stage in range(len(WIDTHS))]
    ratios = [max(column) / min(column) for column in columns]
    least = min(share for row in found.values() for share in row["contribution"])
    return {
        "scheme": scheme,
        "step": step,
        "depths": depths,
        "score_ratio": ratios[0],
        "rms_ratio": max(ratios[1:]),
        "least_contribution": least,
        "passes": max(ratios) <= LARGEST_RATIO and least >= CONTRIBUTION_FLOOR,
    }


def line(result: dict[str, Any], row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"| {result['scheme']} | {result['lr']:g} | {result['applications']} | {row['step']} |"
    if row["loss"] == "not finite":
        return f"{name} not finite | | | |"
    stages = " / ".join(f"{value:.3g}" for value in row["stage_rms"])
    shares = " / ".join(f"{value:.2g}" for value in row["contribution"])
    return f"{name} {row['logit_change']:.3g} | {stages} | {shares} | {row['loss']:.3f} |"


def plot(results: list[dict[str, Any]], lr: float, path: Path) -> None:
    """Change of the scores, and RMS of the last stage, over depth: one line a scheme, one column a step."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    results = [result for result in results if result["lr"] == lr]
    steps = sorted({row["step"] for result in results for row in result["rows"]})
    columns = {
        "change of the scores": lambda row: row["logit_change"],
        "RMS of stage 2": lambda row: row["stage_rms"][2],
    }
    figure, panels = plt.subplots(2, len(steps), figsize=(4 * len(steps), 6.5), squeeze=False)
    for panel_row, (label, value) in zip(panels, columns.items(), strict=True):
        for panel, step in zip(panel_row, steps, strict=True):
            for scheme in dict.fromkeys(result["scheme"] for result in results):
                points = sorted(
                    (result["applications"], value(row))
                    for result in results
                    for row in result["rows"]
                    if result["scheme"] == scheme and row["step"] == step and "logit_change" in row
                )
                if points:
                    panel.loglog(*zip(*points, strict=True), marker="o", label=scheme)
            panel.set(title=f"after {step} Adam steps", xlabel="applications", ylabel=label)
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    # matplotlib ends lines of a path with spaces.
    path.write_text("\n".join(row.rstrip() for row in path.read_text().splitlines()) + "\n")


def merged(known: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The results with a new one in the place of that of the same scheme, depth and rate."""
    key = ("scheme", "applications", "lr")
    return [*(old for old in known if any(old[name] != new[name] for name in key)), new]


def main() -> None:
    """Print a Markdown table and the verdicts; write figures and plot on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal", description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--depths", nargs="*", type=int, default=list(LOOPS), choices=LOOPS, help="none: only the plot")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 10, 100], help="report after these, rising")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=[1e-3], help="several make a sweep; the first is plotted"
    )
    parser.add_argument("--skip", default="frozen", choices=("frozen", "learned", "slow"))
    parser.add_argument("--projections", default="per_loop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.svg, beside what NAME.json holds already")
    args = parser.parse_args()
    setting = {"skip": args.skip, "projections": args.projections, "batch": args.batch, "torch": torch.__version__}
    results: list[dict[str, Any]] = []
    if args.out is not None and args.out.with_suffix(".json").is_file():
        content = json.loads(args.out.with_suffix(".json").read_text())
        if content["setting"] != setting:
            raise SystemExit(
                f"error: {args.out}.json holds another setting: {content['setting']}; choose another --out"
            )
        results = content["results"]
    print("| scheme | rate | applications | step | change of scores | stage RMS | contribution | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for lr in args.lr:
        for scheme in args.schemes:
            for depth in args.depths:
                config = config_at(depth, scheme, args.skip, args.projections)
                rows = check(config, lr=lr, report_steps=tuple(args.steps), batch=args.batch)
                result = {"scheme": scheme, "applications": depth, "lr": lr, "rows": rows}
                results = merged(results, result)
                for row in rows:
                    print(line(result, row), flush=True)
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    content = {"setting": setting, "results": results}
                    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    for scheme in args.schemes:
        for step in args.steps:
            found = verdict(results, scheme, args.lr[0], step)
            if found is not None:
                print(found)
    if args.out is not None:
        plot(results, args.lr[0], args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
