"""`sret-scale report`: run folders in, one page that opens from disk out."""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale report runs/demo -o runs/demo/report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of several")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="PAGE",
        help="page to write, its figures beside it in PAGE_files (default: report.html)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    # matplotlib costs half a second, which --help need not pay.
    from data_pipelines.checked_files import printable
    from sret_scale.lab.report.page import write_report

    report = write_report(args.runs, args.output)
    for reason in report.left_out:
        print(f"left out: {printable(reason)}")
    runs = "1 run" if report.num_runs == 1 else f"{report.num_runs} runs"
    print(f"wrote {report.page} ({runs}) and {len(report.files)} figure files in {report.files[0].parent}/")
    return 0
