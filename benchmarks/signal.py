"""Coordinate check of branch schemes over depth: `python -m benchmarks.signal`.

A scheme is good if one learning rate fits every depth: after the same Adam steps the change of the scores and the RMS
of the stages stay within a factor of 2 from 20 to 1000 applications, while the branches still contribute (a scheme that
switches depth off would win every other column). Fixed random images and labels, small-image widths 32/64/128.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sret_scale.model import Noise, SReT, SReTConfig, preset

# Applications -> loops per stage, for blocks 2-5-3.
LOOPS = {20: (2, 2, 2), 108: (12, 12, 8), 300: (30, 33, 25), 1000: (115, 130, 40)}
SCHEMES = ("published", "inv_sqrt", "loop_aware", "layerscale", "rezero", "subln", "deepnorm", "deeploop")


def config_at(depth: int, scheme: str, skip: str, projections: str) -> SReTConfig:
    """The demo model at a depth; a norm placement's name stands for that placement."""
    base = preset("demo_control_20")
    if scheme in ("subln", "deepnorm", "deeploop"):
        options = {"norm_placement": scheme, "branch_scheme": "loop_aware" if scheme == "subln" else "published"}
    else:
        options = {"branch_scheme": scheme}
    stages = tuple(
        replace(stage, num_loops=loops, skip=skip, projections=projections, **options)
        for stage, loops in zip(base.stages, LOOPS[depth], strict=True)
    )
    return replace(base, stages=stages)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().square().mean().sqrt())


def check(config: SReTConfig, *, lr: float, report_steps: tuple[int, ...], batch: int) -> list[dict[str, Any]]:
    """One row per reported step: change of scores, RMS and contribution of each stage, loss."""
    torch.manual_seed(0)
    model = SReT(config)
    model.stem.eval()
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.randn(batch, 3, 28, 28, generator=generator)
    labels_B = torch.randint(10, (batch,), generator=generator)
    noise = Noise(0, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    first_BC = model(images_BCHW, noise).detach()
    rows = []
    for step in range(1, report_steps[-1] + 1):
        loss = F.cross_entropy(model(images_BCHW, noise), labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(float(loss.detach())):
            return [*rows, {"step": step, "loss": "not finite"}]
        if step in report_steps:
            rows.append({"step": step, **_measured(model, images_BCHW, first_BC, labels_B)})
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


def line(scheme: str, depth: int, row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["loss"] == "not finite":
        return f"| {scheme} | {depth} | {row['step']} | not finite | | | |"
    stages = " / ".join(f"{value:.3g}" for value in row["stage_rms"])
    shares = " / ".join(f"{value:.2g}" for value in row["contribution"])
    return (
        f"| {scheme} | {depth} | {row['step']} | {row['logit_change']:.3g} | {stages} | {shares} | {row['loss']:.3f} |"
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Change of the scores over depth, one line a scheme, one panel a step."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    steps = sorted({row["step"] for result in results for row in result["rows"]})
    figure, panels = plt.subplots(1, len(steps), figsize=(4 * len(steps), 3.5), squeeze=False)
    for panel, step in zip(panels[0], steps, strict=True):
        for scheme in dict.fromkeys(result["scheme"] for result in results):
            points = [
                (result["applications"], row["logit_change"])
                for result in results
                for row in result["rows"]
                if result["scheme"] == scheme and row["step"] == step and "logit_change" in row
            ]
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=scheme)
        panel.set(title=f"after {step} steps", xlabel="applications", ylabel="change of the scores (RMS)")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print a Markdown table; write figures and plot on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal", description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["published", "inv_sqrt", "loop_aware"], choices=SCHEMES)
    parser.add_argument("--depths", nargs="+", type=int, default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 10], help="report after these, in rising order")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--skip", default="frozen", choices=("frozen", "learned", "slow"))
    parser.add_argument("--projections", default="per_loop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write NAME.json and NAME.svg")
    args = parser.parse_args()
    print("| scheme | applications | step | change of scores | stage RMS | contribution | loss |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for scheme in args.schemes:
        for depth in args.depths:
            config = config_at(depth, scheme, args.skip, args.projections)
            rows = check(config, lr=args.lr, report_steps=tuple(args.steps), batch=args.batch)
            results.append({"scheme": scheme, "applications": depth, "rows": rows})
            for row in rows:
                print(line(scheme, depth, row), flush=True)
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps({"lr": args.lr, "skip": args.skip, "results": results}))
        plot(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
