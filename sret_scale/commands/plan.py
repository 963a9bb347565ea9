"""`sret-scale plan`: what a model needs to train, what fits, and with which recomputation. Needs no GPU and no data."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sret_scale.memory import Plan

EXAMPLE = """examples:
  sret-scale plan sret_t_108 --memory 10GiB --micro-batch auto --precision bf16 --draw plan.png
  sret-scale plan sret_t model.num_loops=50 --memory 80GiB
  sret-scale plan sret_t_1000 --memory 80GiB --teacher timm:regnety_160.deit_in1k"""

TEACHER_MICRO_BATCH = 64
"""Images a teacher answers at once where the student's micro-batch is still to be chosen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the machine."""
    parser.add_argument("preset", help="a preset such as sret_t_108 (`describe` lists all), recipe, YAML file or run")
    parser.add_argument("overrides", nargs="*", metavar="model.field=value", help="fields of the model to change")
    parser.add_argument(
        "--memory",
        default="80GiB",
        help="memory of one device, such as 80GiB, or auto for what is free here (default: %(default)s)",
    )
    parser.add_argument(
        "--reserve", default="1GiB", help="how much of it to leave for the device's context (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher", help="a live teacher beside the student, written as in distill.teacher (needs no weights)"
    )
    parser.add_argument(
        "--micro-batch", default="auto", help="images per rank and forward pass, or auto (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=int, help="side of the square input in pixels (default: the preset's)")
    parser.add_argument(
        "--precision",
        default="bf16",
        choices=("fp32", "bf16"),
        help="bf16 means autocast; weights stay fp32 (default: bf16)",
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks (default: %(default)s)")
    parser.add_argument("--zero-stage", type=int, default=1, help="DeepSpeed's ZeRO stage (default: %(default)s)")
    parser.add_argument(
        "--device", default="gpu", choices=("gpu", "cpu"), help="kind of device to model times for (default: gpu)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="also draw the schedules, to a .png, .svg or .pdf file"
    )


def run(args: argparse.Namespace) -> None:
    """Print the fastest plan that fits."""
    from sret_scale.config.recipes import configuration, of_run_too
    from sret_scale.memory import plan_for
    from sret_scale.memory.planning.draw import draw_schedules
    from sret_scale.memory.planning.micro_batch import BatchSearch
    from sret_scale.memory.planning.rank_state import parse_bytes
    from sret_scale.memory.planning.step_cost import DEVICES

    size = [] if args.image_size is None else [f"model.image_size={args.image_size}"]
    budget_bytes = free_bytes(args.device) if args.memory == "auto" else parse_bytes(args.memory, "--memory")
    micro_batch_size = None if args.micro_batch == "auto" else _positive(args.micro_batch)
    config = configuration(of_run_too(args.preset), [*args.overrides, *size]).model
    # As in a run with a budget: `stem_repeats_norms`.
    batches = BatchSearch(config, args.precision, DEVICES[args.device], repeats_norms=args.zero_stage < 3)
    beside = teacher_of(args, config.num_classes, micro_batch_size or TEACHER_MICRO_BATCH)
    reserved_bytes = parse_bytes(args.reserve, "--reserve") + beside
    print("working out what a step needs, up to half a minute at 1000 applications ...", file=sys.stderr)
    plan = plan_for(
        batches,
        budget_bytes=budget_bytes,
        micro_batch_size=micro_batch_size,
        world_size=args.world_size,
        zero_stage=args.zero_stage,
        reserved_bytes=reserved_bytes,
    )
    largest = batches.largest(budget_bytes - reserved_bytes - plan.state.total)
    if args.json:
        record = {"preset": args.preset, **plan.to_json(), "teacher": beside, "largest_micro_batch": largest}
        print(json.dumps(record, indent=2))
    else:
        print(table(args.preset, plan, largest, beside))
    if args.draw:
        draw_schedules(plan.schedules, args.draw, title=f"{args.preset}: forward and backward pass of one micro-batch")


def free_bytes(device: str) -> int:
    """Bytes that are free now on the fullest GPU of this machine, or on a machine without one in its memory.

    Raises ValueError for GPUs where there is none.
    """
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    count = torch.cuda.device_count()
    if not count:
        raise ValueError("--memory auto: this machine has no GPU; give a size such as --memory 80GiB, or --device cpu")
    return min(torch.cuda.mem_get_info(index)[0] for index in range(count))


def teacher_of(args: argparse.Namespace, num_classes: int, micro_batch_size: int) -> int:
    """Bytes of the live teacher that was asked for."""
    from sret_scale.distill.footprint import teacher_bytes
    from sret_scale.train.load_run import untrained_teacher_run

    if args.teacher is None:
        return 0
    return teacher_bytes(
        args.teacher,
        num_classes=num_classes,
        micro_batch_size=micro_batch_size,
        precision=args.precision,
        untrained_run=untrained_teacher_run,
    ).total


def table(name: str, plan: "Plan", largest: int, teacher: int) -> str:
    """The plan as aligned lines of text."""
    from sret_scale.memory.planning.ledger import account
    from sret_scale.memory.planning.rank_state import format_bytes

    rows = {
        "parameters": plan.state.parameters,
        "gradients": plan.state.gradients,
        "optimizer state": plan.state.optimizer,
        "buckets": plan.state.buckets,
        "teacher": teacher,
        "reserved": plan.reserved - teacher,
        "activations": plan.activations,
        "total": plan.total_bytes,
        "budget": plan.budget_bytes,
    }
    lines = [f"{name}, micro-batch {plan.micro_batch_size} (the largest that fits: {largest})"]
    lines += [f"  {label:<16}{format_bytes(count):>12}" for label, count in rows.items()]
    lines.append(
        f"  forward runs without a tape per application: {plan.untaped_runs:.2f}"
        f" ({100 * plan.untaped_runs / 3:.0f} % more work than no recomputation)"
    )
    lines.append(f"  modelled speed, for ranking only: {plan.modelled_images_per_s:,.0f} samples/s")
    for index, schedule in enumerate(plan.schedules):
        ledger = account(schedule)
        lines.append(
            f"  stage {index}: {schedule.num_applications:>5} applications, {schedule.name}: {ledger.peak_slots} slots,"
            f" {ledger.peak_taped} taped at once, r = {ledger.passes}"
        )
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--micro-batch: expected a whole number of at least 1, or auto, got {text!r}")
    return int(text)
