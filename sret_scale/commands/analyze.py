"""`sret-scale analyze`: looks into trained runs - what each loop is worth, how deep gradients must go."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  sret-scale analyze loops runs/depth/num_loops-12
  sret-scale analyze horizon runs/depth/num_loops-12 --images 64

loops       accuracy when a loop is left out, run twice, or swapped with the next
horizon     how alike gradients through the last k loops and through all are, what a step along them gains, their memory

Figures (SVG, PNG, CSV) are written to RUN/analysis; with several runs, to that of the first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which look, at which runs, how closely."""
    parser.add_argument("kind", choices=("loops", "horizon"), help="which analysis")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of trained runs")
    parser.add_argument("--images", type=int, default=512, help="number of test images to use (default: 512)")
    parser.add_argument("-o", "--output", type=Path, help="folder for the figures (default: RUN/analysis)")
    parser.add_argument("--loops", type=int, default=16, help="loops: at most so many loops per stage (default: 16)")


def run(args: argparse.Namespace) -> None:
    """Analyse, say the result in a line a run, write the figures."""
    from sret_scale.lab.analysis.horizon import horizon, horizon_figure, in_words
    from sret_scale.lab.analysis.loop_worth import in_lines, loop_figure, open_subject, study_loops

    output = args.output or args.runs[0] / "analysis"
    charts = []
    for index, folder in enumerate(args.runs):
        if args.kind == "horizon":
            points = horizon(folder, args.images)
            charts.append(horizon_figure(folder.resolve().name, points, index))
            print(f"{folder.resolve().name}: {in_words(points)}")
        else:
            subject = open_subject(folder, args.images, print)
            # Before minutes are spent; not before it is known that the first run is one.
            output.mkdir(parents=True, exist_ok=True)
            study = study_loops(subject, most_loops=args.loops)
            charts.append(loop_figure(study, index))
            print("\n".join(in_lines(study)))
    output.mkdir(parents=True, exist_ok=True)
    files = [file for chart in charts for file in chart.write(output)]
    print(f"wrote {', '.join(str(file) for file in files if file.suffix == '.svg')}, each also as PNG and CSV")
