"""`sret-scale evaluate`: the accuracy of a run's newest checkpoint on a whole shard set."""

import argparse
import json
from pathlib import Path

EXAMPLE = """examples:
  sret-scale evaluate runs/demo/student
  sret-scale evaluate runs/sret_t --weights raw --shards shards/imagenet-v2 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and what to evaluate of it."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--weights", choices=("raw", "ema"), help="default: the moving average where one is kept")
    parser.add_argument("--shards", help="folder or URL of shards (default: the run's test shards)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Evaluate in this process, on its GPU where there is one."""
    import dataclasses
    import sys

    from data_pipelines.remote import open_data
    from sret_scale.train.distributed import ranks_from_environment
    from sret_scale.train.evaluate import evaluate
    from sret_scale.train.load import load_config, load_model

    config = load_config(args.run)
    shards = open_data(args.shards or config.data.test_folder, config.data)
    if shards.num_classes != config.model.num_classes:
        raise ValueError(
            f"{shards.folder} has {shards.num_classes} classes, the model of {args.run} has {config.model.num_classes}"
        )
    ranks = ranks_from_environment()
    model, kind, step = load_model(args.run, args.weights, lambda text: print(text, file=sys.stderr))
    result = evaluate(model.to(ranks.device), shards, config, ranks)
    assert result is not None, "nothing here asks it to stop"
    if args.json:
        print(json.dumps({"run": str(args.run), "step": step, "weights": kind, **dataclasses.asdict(result)}, indent=1))
    else:
        print(
            f"{args.run} at step {step}, {kind} weights, {result.num_samples:,} images of {shards.folder}: "
            f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} "
            f"({result.images_per_s:,.0f} images/s)"
        )
