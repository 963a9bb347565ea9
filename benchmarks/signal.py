"""Coordinate check of branch schemes over depth: `python -m benchmarks.signal`.

A scheme is good if one learning rate fits every depth: after the same Adam steps the change of the scores and the RMS
of the stages stay within a factor of 2 from 20 to 1000 applications, while the branches still contribute (a scheme that
switches depth off would win every other column). A toy: blocks 2-5-3 of widths 16/32/64 on the sample data's images,
shrunk to 16 pixels, a new batch every step, each figure a mean over initial weights and taken on images kept aside.
Several rates make a sweep: the rate of least loss at each depth. With --out, rows are added to those of earlier calls.
"""

import argparse
import gzip
import itertools
import json
import math
import statistics
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
# Images on which everything is measured: at 8 of them, and 8 a step, the noise of one run was a factor of 2.
KEPT_IMAGES = 64


def config_at(depth: int, scheme: str, skip: str, projections: str) -> SReTConfig:
    """The toy model at a depth; a norm placement's name stands for that placement."""
    base = preset("demo_control_20")
    if scheme in PLACEMENTS:
        options: dict[str, Any] = {
            "norm_placement": scheme,
            "branch_scheme": "loop_aware" if scheme == "subln" else "published",
        }
    else:
        options = {"branch_scheme": scheme}
    toy: dict[str, Any] = {"num_heads": 2, "groups": (1,), "skip": skip, "projections": projections}
    stages = tuple(
        replace(stage, width=width, num_loops=loops, **toy, **options)
        for stage, width, loops in zip(base.stages, WIDTHS, LOOPS[depth], strict=True)
    )
    return replace(base, stages=stages, image_size=IMAGE_SIZE)


def sample_images(count: int) -> tuple[Tensor, Tensor]:
    """The first training images of the sample data, (count, 3, 16, 16), and their labels; as many more change none.

    Those kept aside have mean 0 and deviation 1.
    """
    folder = files("data_pipelines") / "sample" / "fashion_mnist"
    pixels, labels = (
        gzip.decompress((folder / f"train-{kind}-ubyte.gz").read_bytes()) for kind in ("images-idx3", "labels-idx1")
    )
    images = torch.tensor(list(pixels[16 : 16 + count * 28 * 28]), dtype=torch.float32).view(count, 1, 28, 28)
    images = F.interpolate(images, size=IMAGE_SIZE, mode="area").expand(-1, 3, -1, -1)
    kept = images[:KEPT_IMAGES]
    return (images - kept.mean()) / kept.std(), torch.tensor(list(labels[8 : 8 + count]))


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().square().mean().sqrt())


def check(
    config: SReTConfig, *, seed: int, lr: float, report_steps: tuple[int, ...], batch: int
) -> list[dict[str, Any]]:
    """One row per reported step: change of scores, RMS and contribution of each stage, loss, on images kept aside."""
    torch.manual_seed(seed)
    model = SReT(config)
    model.stem.eval()
    images_BCHW, labels_B = sample_images(KEPT_IMAGES + batch * report_steps[-1])
    kept_BCHW, kept_B = images_BCHW[:KEPT_IMAGES], labels_B[:KEPT_IMAGES]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    first_BC = model(kept_BCHW, Noise(0, 0)).detach()
    rows: list[dict[str, Any]] = []
    for step in range(1, report_steps[-1] + 1):
        part = slice(KEPT_IMAGES + (step - 1) * batch, KEPT_IMAGES + step * batch)
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


def means(results: list[dict[str, Any]], scheme: str, lr: float, step: int) -> dict[int, list[float]]:
    """Depth -> change of scores, RMS of the stages, their contributions, loss: means over the seeds; empty if a run of
    the depth was not finite."""
    rows: dict[int, list[list[float]]] = {}
    for result in results:
        for row in result["rows"]:
            if (result["scheme"], result["lr"], row["step"]) == (scheme, lr, step):
                finite = row["loss"] != "not finite"
                columns = [row["logit_change"], *row["stage_rms"], *row["contribution"], row["loss"]] if finite else []
                rows.setdefault(result["applications"], []).append(columns)
    return {
        depth: [statistics.fmean(column) for column in zip(*rows[depth], strict=True)] if all(rows[depth]) else []
        for depth in sorted(rows)
    }


def verdict(results: list[dict[str, Any]], scheme: str, lr: float, step: int) -> dict[str, Any] | None:
    """Spread over the depths that were run at this rate and step, and whether the scheme passes; None for one depth."""
    found = means(results, scheme, lr, step)
    if len(found) < 2:
        return None
    name = {"scheme": scheme, "lr": lr, "step": step, "depths": list(found)}
    if not all(found.values()):
        return {**name, "passes": False}
    columns = list(zip(*found.values(), strict=True))
    ratios = [max(column) / min(column) for column in columns[: 1 + len(WIDTHS)]]
    least = min(map(min, columns[1 + len(WIDTHS) : -1]))
    return {
        **name,
        "score_ratio": ratios[0],
        "rms_ratio": max(ratios[1:]),
        "least_contribution": least,
        "passes": max(ratios) <= LARGEST_RATIO and least >= CONTRIBUTION_FLOOR,
    }


def optimum(results: list[dict[str, Any]], scheme: str, lrs: list[float], step: int, depth: int) -> dict[str, Any]:
    """Loss at each of the rates, and the rate of least loss."""
    columns = {lr: means(results, scheme, lr, step).get(depth) for lr in lrs}
    losses = {lr: found[-1] for lr, found in columns.items() if found}
    return {"losses": losses, "best_lr": min(losses, key=lambda lr: losses[lr]) if losses else math.nan}


def line(result: dict[str, Any], row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"| {result['scheme']} | {result['lr']:g} | {result['applications']} | {result['seed']} | {row['step']} |"
    if row["loss"] == "not finite":
        return f"{name} not finite | | | |"
    stages = " / ".join(f"{value:.3g}" for value in row["stage_rms"])
    shares = " / ".join(f"{value:.2g}" for value in row["contribution"])
    return f"{name} {row['logit_change']:.3g} | {stages} | {shares} | {row['loss']:.3f} |"


def print_verdicts(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A Markdown table of the verdicts at the first rate, and one of the losses where there are several rates."""
    print("\n| scheme | steps | applications | ratio of score changes | ratio of RMS | contribution | passes |")
    print("|---|---|---|---|---|---|---|")
    for scheme, step in itertools.product(args.schemes, args.steps):
        found = verdict(results, scheme, args.lr[0], step)
        if found is None:
            continue
        name = f"| `{scheme}` | {step} | {' '.join(map(str, found['depths']))} |"
        if "score_ratio" in found:
            figures = f" {found['score_ratio']:.2f} | {found['rms_ratio']:.2f} | {found['least_contribution']:.2g} |"
        else:
            figures = " not finite | | |"
        print(name + figures + (" yes |" if found["passes"] else " no |"))
    if len(args.lr) > 1:
        rates = sorted(args.lr)
        print("\n| scheme, steps, applications | " + " | ".join(f"{lr:g}" for lr in rates) + " | best |")
        print("|---" * (len(rates) + 2) + "|")
    for scheme, step, depth in itertools.product(args.schemes, args.steps, args.depths if len(args.lr) > 1 else ()):
        best = optimum(results, scheme, rates, step, depth)
        losses = " | ".join(f"{best['losses'][lr]:.2f}" if lr in best["losses"] else "-" for lr in rates)
        print(f"| {scheme}, {step}, {depth} | {losses} | {best['best_lr']:g} |")


def plot(results: list[dict[str, Any]], lr: float, path: Path) -> None:
    """Change of the scores, and RMS of the last stage, over depth: one line a scheme, one column a step."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    steps = sorted({row["step"] for result in results for row in result["rows"] if result["lr"] == lr})
    columns = {"change of the scores": 0, "RMS of stage 2": len(WIDTHS)}
    size = (4 * len(steps), 7)
    figure, panels = plt.subplots(2, len(steps), figsize=size, squeeze=False, sharex=True, sharey="row")
    for panel_row, (label, column) in zip(panels, columns.items(), strict=True):
        for panel, step in zip(panel_row, steps, strict=True):
            for scheme in SCHEMES:
                found = means(results, scheme, lr, step)
                points = [(depth, values[column]) for depth, values in found.items() if values]
                if points:
                    # A scheme keeps its colour where another has no points.
                    colour = f"C{SCHEMES.index(scheme)}"
                    panel.loglog(*zip(*points, strict=True), marker="o", color=colour, label=scheme)
            panel.set_xticks(list(LOOPS), list(map(str, LOOPS)))
            panel.minorticks_off()
        panel_row[0].set_ylabel(label)
    for step, top, bottom in zip(steps, *panels, strict=True):
        top.set_title(f"after {step} Adam steps")
        bottom.set_xlabel("applications")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(SCHEMES), fontsize="small")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    # matplotlib ends lines of a path with spaces.
    path.write_text("\n".join(row.rstrip() for row in path.read_text().splitlines()) + "\n")


def merged(known: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The results with a new one; rows of the same run at other steps stay: its steps do not depend on its end."""
    key = ("scheme", "applications", "lr", "seed")
    same = [old for old in known if all(old[name] == new[name] for name in key)]
    steps = {row["step"] for row in new["rows"]}
    rows = [row for old in same for row in old["rows"] if row["step"] not in steps] + new["rows"]
    others = [old for old in known if old not in same]
    return [*others, {**new, "rows": sorted(rows, key=lambda row: row["step"])}]


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal", description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--depths", nargs="*", type=int, default=list(LOOPS), choices=LOOPS, help="none: only the plot")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 10, 100], help="report after these, rising")
    parser.add_argument(
        "--lr", nargs="+", type=float, default=[1e-3], help="several make a sweep; the first is plotted"
    )
    parser.add_argument("--skip", default="frozen", choices=("frozen", "learned", "slow"))
    parser.add_argument("--projections", default="per_loop")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the initial weights")
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.svg, beside what NAME.json holds already")
    return parser.parse_args()


def known_results(out: Path | None, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """What earlier calls wrote; an error where they had another setting."""
    if out is None or not out.with_suffix(".json").is_file():
        return []
    content: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    if content["setting"] != setting:
        raise SystemExit(f"error: {out}.json holds another setting: {content['setting']}; choose another --out")
    found: list[dict[str, Any]] = content["results"]
    return found


def main() -> None:
    """Print a Markdown table and the verdicts; write figures and plot on request."""
    args = parsed_arguments()
    setting = {"skip": args.skip, "projections": args.projections, "batch": args.batch, "torch": torch.__version__}
    results = known_results(args.out, setting)
    print("| scheme | rate | applications | seed | step | change of scores | stage RMS | contribution | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    for lr, scheme, depth, seed in itertools.product(args.lr, args.schemes, args.depths, args.seeds):
        config = config_at(depth, scheme, args.skip, args.projections)
        rows = check(config, seed=seed, lr=lr, report_steps=tuple(args.steps), batch=args.batch)
        result = {"scheme": scheme, "applications": depth, "lr": lr, "seed": seed, "rows": rows}
        results = merged(results, result)
        for row in rows:
            print(line(result, row), flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"setting": setting, "results": results}
            args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print_verdicts(results, args)
    if args.out is not None:
        plot(results, args.lr[0], args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
