"""`sret-scale evaluate`: the accuracy of a run's newest checkpoint on a whole shard set."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sret_scale.commands.arguments import CACHE, HOSTFILE, WEIGHTS

if TYPE_CHECKING:
    from sret_scale.launch.requests import Work

EXAMPLE = """examples:
  sret-scale evaluate runs/demo/student
  sret-scale evaluate runs/sret_t --weights raw --shards shards/imagenet-v2 --json
  sret-scale evaluate runs/sret_t --details mistakes --predictions answers.csv
  sret-scale evaluate runs/sret_t --hostfile hosts
  sret-scale evaluate runs/elastic --loops 16
  sret-scale evaluate runs/reach --applications 20,54,108,300 --image-size 39 --shards shards/mazes_39
  sret-scale evaluate runs/elastic --early-exit confidence --thresholds 0.5,0.8,0.95"""


MOST_COUNTS = 100
"""Of --applications: what a line of metrics.jsonl holds with room to spare."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, what to evaluate of it, and where."""
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument("--shards", help="folder or URL of the shards (default: the run's test shards)")
    parser.add_argument("--ranks", type=int, help="number of ranks on this machine (default: this process alone)")
    parser.add_argument("--hostfile", **HOSTFILE)
    parser.add_argument(
        "--loops",
        type=int,
        help="evaluate at another depth: loops of the stage that has most, the others in proportion",
    )
    parser.add_argument(
        "--applications",
        metavar="N,N,...",
        help="answers after so many block applications, ascending, all from one pass; draws them into RUN/depth_curve",
    )
    parser.add_argument("--image-size", type=int, help="pixels a side of the images (default: the run's)")
    parser.add_argument(
        "--early-exit",
        choices=("confidence", "entropy", "convergence"),
        help="let each image stop looping by this rule; draws accuracy over multiply-adds into RUN/early_exit",
    )
    parser.add_argument("--thresholds", help="thresholds of the rule, separated by commas (default: a range of them)")
    parser.add_argument("--beam", type=int, metavar="N", help="translate too, with N beginnings: BLEU and chrF")
    parser.add_argument("--cache", **CACHE)
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write CSV: what each sample was taken for")
    parser.add_argument(
        "--details",
        type=Path,
        metavar="FOLDER",
        help="write accuracy by class, the confusion matrix as CSV and picture, and a sheet of the surest mistakes",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be evaluated and how, and start nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate in this process, or on ranks where some were asked for; returns the exit status."""
    has_answers = bool(args.predictions or args.details)
    _check(args, has_answers=has_answers)
    if args.early_exit:
        return _early_exit(args)
    if args.applications:
        return _depth_curve(args)
    from sret_scale.train.evaluate_main import evaluation

    status, result = _result(args, {"has_answers": has_answers}, evaluation)
    if status or args.dry_run:
        return status
    answers = result.pop("answers", [])
    if args.beam:
        from sret_scale.lab.translation_scores import translation_scores

        result |= translation_scores(args.run, args.shards, args.weights, args.loops, args.beam, args.cache)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        of_text = {"bits_per_byte": "windows", "saved": "pairs"}
        unit = next((unit for name, unit in of_text.items() if name in result), "images")
        print(
            f"{result['run']} at step {result['step']}, {result['weights']} weights, "
            f"{result['applications']:,} applications, "
            f"{result['num_samples']:,} {unit} of {result['shards']}: {_in_words(result)}, "
            f"loss {result['loss']:.4f} ({result['images_per_s']:,.0f} {unit}/s)"
        )
        if result["classes_without_samples"]:
            from data_pipelines.shards.classes import describe_missing

            print(describe_missing(result["classes_without_samples"], result["shards"]))
        if result["untrained_projections"]:
            print(
                f"{result['untrained_projections']:,} projections belong to loops that the run does not have: nobody "
                "trained them, and each hands its input on as it is"
            )
    if has_answers:
        _write_answers(args, answers)
    return 0


def _check(args: argparse.Namespace, *, has_answers: bool) -> None:
    """ValueError for options that do not go together. Turns --applications into its numbers."""
    if args.loops is not None and args.loops < 1:
        raise ValueError(f"--loops: expected at least 1, got {args.loops}")
    if args.thresholds and not args.early_exit:
        raise ValueError("--thresholds belongs to --early-exit: give that too, or leave it out")
    if has_answers and args.early_exit:
        raise ValueError("--predictions and --details belong to an evaluation without --early-exit")
    if args.image_size is not None and not 1 <= args.image_size <= 1 << 14:
        raise ValueError(f"--image-size: expected 1 to {1 << 14:,} pixels, got {args.image_size}")
    if args.applications is not None:
        for name, other in (("--loops", args.loops), ("--early-exit", args.early_exit), ("--details", has_answers)):
            if other:
                raise ValueError(f"--applications is another evaluation than {name}: leave one of them out")
        args.applications = _counts(args.applications)
    if args.early_exit and args.image_size is not None:
        raise ValueError("--early-exit knows the run's own image size alone: leave --image-size out")
    if args.cache != "each" and args.beam is None:
        raise ValueError(f"--cache {args.cache} is of translations: give --beam too, or leave it out")
    if args.beam is not None:
        from sret_scale.tasks.translation import check_beam

        check_beam(args.beam)
        if args.early_exit or args.applications or has_answers:
            raise ValueError("--beam is of translations: leave the options for images out")


def _in_words(result: dict[str, Any]) -> str:
    if "top1" in result:
        return f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
    if "bits_per_byte" in result:
        return f"{result['bits_per_byte']:.4f} bits per byte"
    if "bleu" in result:
        signatures = "; ".join(result[f"{name}_signature"] for name in ("bleu", "chrf"))
        return (
            f"BLEU {result['bleu']:.2f} and chrF {result['chrf']:.2f} (copies of the sources have "
            f"{result['bleu_of_copy']:.2f} and {result['chrf_of_copy']:.2f}; {signatures}; "
            f"{result['sentences_per_s']:.1f} sentences/s)"
        )
    if "saved" in result:
        return f"{result['saved']:.2%} saved of what equal odds cost"
    return f"exact match {result['exact']:.2%}, balanced accuracy of tokens {result['balanced']:.2%}"


def _counts(text: str) -> list[int]:
    """The numbers of --applications. ValueError for what is none, or not ascending."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    is_ascending = bool(counts) and counts[0] > 0 and counts[-1] <= 1 << 16 and counts == sorted(set(counts))
    if not is_ascending or len(counts) > MOST_COUNTS:
        raise ValueError(
            f"--applications: expected at most {MOST_COUNTS} ascending whole numbers of 1 to {1 << 16:,} such as "
            f"20,54,108, got {text[:200]!r}"
        )
    return counts


def _depth_curve(args: argparse.Namespace) -> int:
    """Print and draw accuracy over applications, and add it to the run's metrics."""
    from sret_scale.lab.depth_curve import curve_table, depth_curve, keep_curve

    status, line = _result(args, {}, depth_curve)
    if status or args.dry_run:
        return status
    files = keep_curve(args.run, line, args.run / "depth_curve")
    print(json.dumps(line, indent=1) if args.json else curve_table(line))
    if not args.json:
        print(f"written: {', '.join(map(str, files))}")
    return 0


def _write_answers(args: argparse.Namespace, answers: Any) -> None:
    from sret_scale.lab.answers import write_details, write_predictions
    from sret_scale.train.evaluate_main import open_shards

    shards, _ = open_shards(args.run, args.shards)
    files = write_details(args.details, shards, answers) if args.details else []
    if args.predictions:
        write_predictions(args.predictions, shards, answers)
        files.append(args.predictions)
    if not args.json:
        print(f"written: {', '.join(map(str, files))}")


def _early_exit(args: argparse.Namespace) -> int:
    """Print and draw accuracy over multiply-adds for each threshold."""
    from sret_scale.lab import early_exit
    from sret_scale.lab.analysis.exit_figure import exit_chart, exit_table

    thresholds = early_exit.THRESHOLDS[args.early_exit]
    if args.thresholds:
        try:
            thresholds = tuple(float(text) for text in args.thresholds.split(","))
        except ValueError as error:
            raise ValueError(f"--thresholds: expected numbers such as 0.5,0.9, got {args.thresholds!r}") from error
    early_exit.check_thresholds(args.early_exit, thresholds)
    asked = {"kind": args.early_exit, "thresholds": thresholds}
    status, result = _result(args, asked, early_exit.exit_points)
    if status or args.dry_run:
        return status
    points = [early_exit.ExitPoint(**point) for point in result]
    files = exit_chart(args.run.name, args.early_exit, points).write(args.run / "early_exit")
    if args.json:
        print(json.dumps([vars(point) for point in points], indent=1))
    else:
        print(exit_table(points))
        print(f"written: {', '.join(map(str, files))}")
    return 0


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """What to evaluate, in words that hold in any working folder."""
    shards = args.shards and (args.shards if ":" in args.shards else str(Path(args.shards).resolve()))
    request = {"run": str(args.run.resolve()), "shards": shards, "weights": args.weights, "image_size": args.image_size}
    return {**request, "applications": args.applications} if args.applications else {**request, "loops": args.loops}


def _result(args: argparse.Namespace, asked: dict[str, Any], work: "Work") -> tuple[int, Any]:
    """(exit status, result) of `work`: in this process, or on the ranks that were asked for. No result where it failed.

    A dry run prints what would be done, and starts and writes nothing.
    """
    from sret_scale.launch.hostfile import hosts_of
    from sret_scale.launch.requests import ask
    from sret_scale.train.distributed import ranks_from_environment
    from sret_scale.train.load_run import load_config

    load_config(args.run)
    request = {**_request(args), **asked}
    if args.ranks or args.hostfile:
        hosts = hosts_of(args.hostfile)
        return ask(work, request, args.run / "evaluation", num_ranks=args.ranks, hosts=hosts, dry_run=args.dry_run)
    if args.dry_run:
        print(f"evaluate in this process:\n{json.dumps(request, indent=1)}")
        return 0, None
    return 0, work({**request, "run": str(args.run), "shards": args.shards}, ranks_from_environment())
