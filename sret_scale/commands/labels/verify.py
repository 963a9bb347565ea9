"""`sret-scale labels verify`: are these still the teacher's answers?"""

import argparse
from pathlib import Path

EXAMPLE = "example: sret-scale labels verify labels/lite0 shards/train --records 256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The store, its images, and how much is asked again."""
    parser.add_argument("folder", type=Path, help="folder of the store")
    parser.add_argument("shards", help="folder of the image shards it was made from")
    parser.add_argument(
        "--records", type=int, default=64, help="how many random records to ask the teacher about (default: 64)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=2e-3,
        help="largest allowed difference in a probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing the records (default: 0)")
    parser.add_argument("--teacher", metavar="SPEC", help="where the teacher is now, if it was moved or is code")
    parser.add_argument(
        "--transform", metavar="NAME", help="the store's data.transform, repeated: it is code, and runs"
    )
    parser.add_argument("--device", default="cpu", help="where the teacher runs (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Status 0 when all is as it was written, 1 when the teacher says something else now."""
    import torch

    from data_pipelines.labels.store import check_files, open_labels
    from data_pipelines.shards.index import open_shards
    from sret_scale.distill.label_verify import plan_teacher, verify_records
    from sret_scale.train.load_run import load_teacher_run

    store, shards = open_labels(args.folder), open_shards(args.shards)
    check_files(store.folder, store.plan)
    print(f"{args.folder}: all checksums are right")
    teacher = plan_teacher(store.plan, args.teacher, torch.device(args.device), load_teacher_run)
    result = verify_records(store, shards, teacher, num_records=args.records, seed=args.seed, transform=args.transform)
    print(
        f"{result.num_records} records compared with the teacher: probabilities differ by at most "
        f"{result.largest_difference:.2e} (sample {result.worst_key!r}, view {result.worst_view}), allowed are "
        f"{args.tolerance:.1e}"
    )
    return 0 if result.largest_difference <= args.tolerance else 1
