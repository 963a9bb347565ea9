"""`sret-scale labels info`: what a store holds."""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale labels info labels/lite0 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The store, and the form of the answer."""
    parser.add_argument("folder", type=Path, help="folder of the store")
    parser.add_argument("--json", action="store_true", help="for other programs")


def run(args: argparse.Namespace) -> int:
    """Prints the plan in short, the size and the coverage."""
    import json

    from data_pipelines.checked_files import printable
    from data_pipelines.labels.records import describe_coverage, record_dtype
    from data_pipelines.labels.store import open_labels

    store = open_labels(args.folder)
    plan = store.plan
    num_samples = sum(count for _, count in plan.shards)
    values = {
        "num_samples": num_samples,
        "num_views": plan.num_views,
        "num_classes": plan.num_classes,
        "top_k": plan.top_k,
        "bytes_per_view": record_dtype(plan.top_k).itemsize,
        "bytes": sum((args.folder / plan.file_name(unit)).stat().st_size for unit in plan.units()),
        "shards_fingerprint": plan.fingerprint,
        "image_size": plan.image_size,
        "view": dict(plan.view),
        "teacher": dict(plan.teacher),
        "coverage": dict(store.coverage),
    }
    if args.json:
        print(json.dumps(values, indent=1))
        return 0
    lines = [
        f"{args.folder}: {num_samples:,} samples x {plan.num_views} views, {values['bytes']:,} bytes",
        f"  top {plan.top_k} of {plan.num_classes} classes, {values['bytes_per_view']} bytes a view",
        *(
            f"  teacher {member['spec']}, weights {member['weights_sha256'][:12]}, {member['image_size']} px"
            for member in plan.members
        ),
        f"  views at {plan.image_size} px: {', '.join(f'{name} {value}' for name, value in plan.view.items())}",
        f"  shards {plan.fingerprint[:12]}",
        f"  {describe_coverage(store.coverage)}",
    ]
    print(printable("\n".join(lines)))
    return 0
