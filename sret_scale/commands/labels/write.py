"""`sret-scale labels write`: a teacher's answers about V views of each image, in files."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sret_scale.config.run_config import RunConfig

EXAMPLE = """examples:
  sret-scale labels write shards/train labels/lite0 --teacher efficientnet-lite0 --views 200 --top-k 10
  sret-scale labels write shards/fashion/train labels/fashion --teacher run:runs/demo_teacher --views 4 --top-k 10 \\
      --recipe demo_student_108 --set data.view_seed=1

Start it once per GPU or machine with --rank and --world-size, or under a launcher that sets RANK and WORLD_SIZE. Ranks
do not communicate; they may be killed, and started again in a different number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is written, from which views, and which part of it by this process."""
    parser.add_argument("shards", help="folder of the image shards")
    parser.add_argument("folder", type=Path, help="folder of the store; an unfinished one is continued")
    parser.add_argument("--teacher", required=True, metavar="SPEC", help="as in distill.teacher; join several with +")
    parser.add_argument(
        "--views", type=int, required=True, help="number V of views of each image; epoch e trains on view e mod V"
    )
    parser.add_argument("--top-k", type=int, required=True, help="number K of classes to keep: 11 + 4 K bytes per view")
    parser.add_argument(
        "--recipe", help="recipe or YAML file of the training to come, for its data section and image size"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="data.field=value",
        help="change how views are drawn, as in training",
    )
    parser.add_argument("--image-size", type=int, help="side of the views in pixels (default: the recipe's, or 224)")
    parser.add_argument("--views-per-file", type=int, help="views in one file (default: 8, or all if there are fewer)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass of the teacher (default: 64)")
    parser.add_argument("--device", help="where the teacher runs (default: the GPU of LOCAL_RANK, or the CPU)")
    parser.add_argument("--rank", type=int, help="rank of this process (default: RANK, or 0)")
    parser.add_argument(
        "--world-size", type=int, help="number of processes that share the work (default: WORLD_SIZE, or 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Write this rank's files."""
    import dataclasses
    import time

    import torch

    from data_pipelines.shards.index import open_shards
    from sret_scale.commands.shards.progress import progress_bar
    from sret_scale.distill import build_teacher
    from sret_scale.distill.label_writer import LabelJob, plan_labels, write_labels
    from sret_scale.train.distributed import ranks_from_environment
    from sret_scale.train.load_run import check_teacher_classes, load_teacher_run

    given = {name: vars(args)[name] for name in ("rank", "world_size") if vars(args)[name] is not None}
    ranks = dataclasses.replace(ranks_from_environment(), **given)
    if not 0 <= ranks.rank < ranks.world_size:
        raise ValueError(f"--rank: expected 0 to {ranks.world_size - 1}, got {ranks.rank}")
    config = _config(args.recipe, args.set)
    data = dataclasses.replace(config.data, view_seed=config.data.view_seed or 0)
    shards = open_shards(args.shards)
    check_teacher_classes(args.teacher, shards.class_names)
    device = torch.device(args.device or ranks.device)
    teacher = build_teacher(
        args.teacher,
        num_classes=shards.num_classes,
        device=device,
        load_run=load_teacher_run,
        precision=config.distill.teacher_precision,
        compiled=config.distill.teacher_compile,
    )
    plan = plan_labels(
        shards,
        teacher,
        data=data,
        image_size=config.images.image_size if args.image_size is None else args.image_size,
        top_k=args.top_k,
        num_views=args.views,
        views_per_file=min(args.views, 8) if args.views_per_file is None else args.views_per_file,
        batch_size=args.batch_size,
    )
    job = LabelJob(folder=args.folder, plan=plan, shards=shards, data=data, teacher=teacher, device=device)
    started = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - started:7.1f} s] {text}", flush=True)

    with progress_bar("labels, counting views") as on_progress:
        is_finished = write_labels(
            job, rank=ranks.rank, world_size=ranks.world_size, report=report, on_progress=on_progress
        )
    if is_finished:
        views = f"data.num_views={args.views} data.view_seed={data.view_seed}"
        report(f"finished; train with distill.teacher=labels:{args.folder} distill.teacher_input=view {views}")
    else:
        report("this rank is done; other ranks have files to write")
    return 0


def _config(recipe: str | None, changes: list[str]) -> "RunConfig":
    """How views are drawn. ValueError for code that a recipe names: it may be a run's config.yaml, which is data."""
    from sret_scale.config.recipes import configuration
    from sret_scale.config.run_config import RunConfig, override

    config = configuration(recipe, changes) if recipe else override(RunConfig(), changes)
    transform = f"data.transform={config.data.transform}"
    if config.data.transform and transform not in changes:
        raise ValueError(f"{recipe} names code, which runs only when you say so: --set {transform}")
    return config
