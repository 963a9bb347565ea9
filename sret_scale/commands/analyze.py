"""`sret-scale analyze`: looks into trained runs - the loss around them, their loops, how deep gradients must go."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale analyze loops runs/depth/num_loops-12
  sret-scale analyze similarity runs/depth/num_loops-12 --images 1000
  sret-scale analyze horizon runs/depth/num_loops-12 --images 64
  sret-scale analyze landscape runs/depth/num_loops-2 runs/depth/num_loops-12 --points 15

landscape   loss along two filter-normalised random directions (arXiv 1712.09913), runs side by side
similarity  linear CKA (arXiv 1905.00414) between the streams after a model's loops
loops       accuracy when a loop is left out, run twice, or swapped with the next
horizon     how alike gradients through the last k loops and through all are, what a step along them gains, their memory

Figures (SVG, PNG, CSV) are written to RUN/analysis; with several runs, to that of the first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which look, at which runs, how closely."""
    parser.add_argument("kind", choices=("landscape", "similarity", "loops", "horizon"), help="which analysis")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of trained runs")
    parser.add_argument("--images", type=int, default=512, help="number of test images to use (default: 512)")
    parser.add_argument("-o", "--output", type=Path, help="folder for the figures (default: RUN/analysis)")
    parser.add_argument("--points", type=int, default=11, help="landscape: points per direction, odd (default: 11)")
    parser.add_argument(
        "--reach", type=float, default=1.0, help="landscape: how far to go in each direction (default: 1.0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="landscape: seed of the directions (default: 0)")
    parser.add_argument(
        "--uses", type=int, default=32, help="similarity: at most so many block applications per stage (default: 32)"
    )
    parser.add_argument("--loops", type=int, default=16, help="loops: at most so many loops per stage (default: 16)")


def run(args: argparse.Namespace) -> None:
    """Analyse, say the result in a line a run, write the figures."""
    from sret_scale.lab.analysis.analysis_figures import landscape_figures, loop_figure, similarity_figure
    from sret_scale.lab.analysis.horizon import horizon, horizon_figure, in_words
    from sret_scale.lab.analysis.landscape import landscape
    from sret_scale.lab.analysis.loop_worth import study_loops
    from sret_scale.lab.analysis.similarity import similarity
    from sret_scale.lab.analysis.subject import open_subject

    charts, surfaces = [], []
    output = args.output or args.runs[0] / "analysis"
    for index, folder in enumerate(args.runs):
        if args.kind == "horizon":
            points = horizon(folder, args.images)
            output.mkdir(parents=True, exist_ok=True)
            charts.append(horizon_figure(folder.resolve().name, points, index))
            print(f"{folder.resolve().name}: {in_words(points)}")
            continue
        subject = open_subject(folder, args.images, print)
        # Before minutes are spent; not before it is known that the first run is one.
        output.mkdir(parents=True, exist_ok=True)
        if args.kind == "landscape":
            surfaces.append(landscape(subject, points=args.points, reach=args.reach, seed=args.seed))
            middle = args.points // 2
            print(
                f"{subject.name}: loss {surfaces[-1].loss[middle, middle]:.3f} at the weights, up to "
                f"{surfaces[-1].loss.max():.3g} within {args.reach:g}"
            )
        elif args.kind == "similarity":
            found = similarity(subject, most_uses=args.uses)
            charts.append(similarity_figure(found, index))
            print(f"{subject.name}: CKA of the first and the last of {len(found.uses)} uses {found.cka[0, -1]:.3f}")
        else:
            study = study_loops(subject, most_loops=args.loops)
            charts.append(loop_figure(study, index))
            for change in ("left out", "repeated", "swapped"):
                worst = min((e for e in study.effects if e.change == change), key=lambda e: e.top1, default=None)
                if worst is not None:
                    print(
                        f"{subject.name}: {100 * study.top1:.1f} % top-1; loop {worst.loop} of stage {worst.stage} "
                        f"{change}: {100 * worst.top1:.1f} %, the most harm of that kind"
                    )
    files = [file for chart in charts + landscape_figures(surfaces) for file in chart.write(output)]
    print(f"wrote {', '.join(str(file) for file in files if file.suffix == '.svg')}, each also as PNG and CSV")
