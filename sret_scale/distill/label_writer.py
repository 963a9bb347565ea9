"""Writes a store of soft labels.

    plan -> units (views of one image shard) -> every `world_size`-th to each rank -> a file each -> header.json

A unit's bytes are a function of the plan: its batches never mix units, so they do not depend on the number of ranks, on
what was there before, or on when a rank was killed. Ranks do not talk: whoever finds all files there writes the header.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.atomic_files import write_whole
from data_pipelines.config import DataConfig
from data_pipelines.labels import store
from data_pipelines.labels.records import (
    Records,
    coverage_sums,
    describe_coverage,
    encode_records,
    record_dtype,
    render_file,
)
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.loader import check_views
from data_pipelines.stream.prefetch import Batch, BatchFiller, PendingBatch
from data_pipelines.stream.processes import Progress
from data_pipelines.stream.quarantine import Quarantine, TooManyBadSamplesError
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.samples import TrainingSamples
from sret_scale.distill.teacher import Teacher

# Records of a batch and the sums of its coverage.
Answer = tuple[Records, dict[str, float]]

# Answers that may wait to be encoded: each holds its logits and, on a GPU, the memory of them.
_ANSWERS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """A store to be written: what, from which images, by whom."""

    folder: Path
    plan: store.LabelPlan
    shards: ShardSet
    data: DataConfig
    teacher: Teacher
    device: torch.device


def plan_labels(
    shards: ShardSet,
    teacher: Teacher,
    *,
    data: DataConfig,
    image_size: int,
    top_k: int,
    num_views: int,
    views_per_file: int,
    batch_size: int,
) -> store.LabelPlan:
    """The plan of a store. Raises ValueError for numbers or views that cannot be."""
    check_views(shards, data, image_size)
    counts = np.bincount(shards.shard_of, minlength=shards.num_shards).tolist()
    return store.LabelPlan(
        fingerprint=shards.fingerprint,
        shards=list(zip(shards.shard_names, counts, strict=True)),
        num_classes=shards.num_classes,
        top_k=top_k,
        num_views=num_views,
        views_per_file=views_per_file,
        batch_size=batch_size,
        teacher=cast(Any, teacher.describe()),
        image_size=image_size,
        view=store.label_view(data, run_seed=0),
    )


def write_labels(
    job: LabelJob,
    *,
    rank: int,
    world_size: int,
    report: Callable[[str], None],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Write this rank's missing units. True when the store is finished, False when other ranks have units to write."""
    job.folder.mkdir(parents=True, exist_ok=True)
    save_plan(job.folder, job.plan)
    mine = list(job.plan.units())[rank::world_size]
    missing = [unit for unit in mine if not is_written(job, unit)]
    report(f"{job.folder}: {len(missing)} of {len(mine)} files to write")
    total = sum((unit.last_view - unit.first_view + 1) * job.plan.shards[unit.shard][1] for unit in missing)
    done = 0

    def count(num_records: int) -> None:
        nonlocal done
        done += num_records
        record_bytes = record_dtype(job.plan.top_k).itemsize
        on_progress(Progress(samples=done, bytes=done * record_bytes, total_samples=total))

    # The number of an epoch is the number of a view here.
    data = dataclasses.replace(job.data, num_views=None, num_repeats=1, view_seed=job.plan.view["seed"])
    size = (3, job.plan.image_size, job.plan.image_size)
    with ShardReader(job.shards) as reader:
        # No image may be replaced by another: the first bad one stops the writer.
        strict = Quarantine(None, max_bad_rate=0.0, samples_per_epoch=job.shards.num_samples)
        source = TrainingSamples(reader, job.shards, data, seed=0, on_bad_sample=strict.add)
        with BatchFiller(
            source, row_shape=size, num_threads=data.workers, stall_s=data.stall_s, in_progress=reader.in_progress
        ) as filler:
            for number, unit in enumerate(missing, 1):
                sums = write_unit(job, unit, filler, count)
                report(f"{number}/{len(missing)} {job.plan.file_name(unit)}: {describe_coverage(mean_coverage(sums))}")
    return finish(job.folder, job.plan)


def save_plan(folder: Path, plan: store.LabelPlan) -> None:
    """Write plan.json, or check that the one there is the same. ValueError names what differs."""
    if not (folder / store.PLAN_NAME).exists():
        write_whole(folder / store.PLAN_NAME, plan.to_json())
    there = store.read_plan(folder)
    before, now = ({item.name: getattr(one, item.name) for item in dataclasses.fields(one)} for one in (there, plan))
    differing = "; ".join(f"{name} {old}, now {new}" for name, old, new in _different(before, now))
    if differing:
        raise ValueError(f"{folder}: holds labels made with other settings ({differing[:400]}); choose another folder")


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of what differs, inside mappings too."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{name}.{inner}", *values) for inner, *values in _different(old, new))
        elif old != new:
            yield name, old, new


def is_written(job: LabelJob, unit: store.Unit) -> bool:
    """Whether a unit's file is there; ValueError when it is there and not what was planned."""
    if not (job.folder / job.plan.file_name(unit)).exists():
        return False
    store.read_header(job.folder, job.plan, unit)
    return True


def write_unit(job: LabelJob, unit: store.Unit, filler: BatchFiller, count: Callable[[int], None]) -> Counter[str]:
    """Ask the teacher about a unit and write its file; the sums of its coverage."""
    num_samples = job.plan.shards[unit.shard][1]
    records_VN = np.empty((unit.last_view - unit.first_view + 1, num_samples), record_dtype(job.plan.top_k))
    sums: Counter[str] = Counter()
    for view, start, (records, batch_sums) in unit_answers(job, unit, filler):
        records_VN[view - unit.first_view, start : start + len(records)] = records
        sums.update(batch_sums)
        count(len(records))
    header = {**dataclasses.asdict(unit), "plan_sha256": job.plan.sha256, "coverage_sums": dict(sums)}
    write_whole(job.folder / job.plan.file_name(unit), render_file(header, records_VN))
    return sums


def unit_answers(job: LabelJob, unit: store.Unit, filler: BatchFiller) -> Iterator[tuple[int, int, Answer]]:
    """(view, place in the shard, answer) of a unit in its order.

    Sorting and measuring an answer takes 7 ms for 64 images of 1000 classes on one core of a 2-core AMD EPYC
    (2026-11-22), as long as a small teacher on a GPU: it is done in a thread, while the teacher is at the next batch.
    """
    pending: deque[tuple[int, int, Future[Answer]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as encoder:
        for view, start, batch in unit_batches(job, unit, filler):
            logits_BC = job.teacher(batch.images.to(job.device, non_blocking=True).float() / 255)
            pending.append((view, start, encoder.submit(encode_answer, job, view, batch, logits_BC)))
            if len(pending) > _ANSWERS_AHEAD:
                oldest, place, answer = pending.popleft()
                yield oldest, place, answer.result()
        for oldest, place, answer in pending:
            yield oldest, place, answer.result()


def encode_answer(job: LabelJob, view: int, batch: Batch, logits_BC: Tensor) -> Answer:
    """(records, coverage sums) of a batch. ValueError that names the sample for logits that are no numbers."""
    if not logits_BC.isfinite().all():
        key = job.shards.key(int(batch.indices[int((~logits_BC.isfinite()).any(dim=1).nonzero()[0])]))
        raise ValueError(f"the teacher gives NaN or infinite logits for sample {key!r}, view {view}; take another")
    log_probs_BC = F.log_softmax(logits_BC, dim=-1)
    records = encode_records(log_probs_BC, batch.views.long().numpy(), job.plan.top_k)
    return records, coverage_sums(log_probs_BC, records, batch.labels)


def unit_batches(job: LabelJob, unit: store.Unit, filler: BatchFiller) -> Iterator[tuple[int, int, Batch]]:
    """(view, place in the shard, batch) of a unit, decoded ahead of their use."""
    first = sum(num_samples for _, num_samples in job.plan.shards[: unit.shard])
    num_samples, batch_size = job.plan.shards[unit.shard][1], job.plan.batch_size
    ahead: deque[tuple[int, int, PendingBatch]] = deque()
    try:
        for view in range(unit.first_view, unit.last_view + 1):
            for start in range(0, num_samples, batch_size):
                indices_B = np.arange(first + start, first + min(start + batch_size, num_samples))
                ahead.append((view, start, filler.submit(view, indices_B, np.zeros_like(indices_B))))
                if len(ahead) > job.data.prefetch_batches:
                    oldest, place, pending = ahead.popleft()
                    yield oldest, place, pending.result()
        for oldest, place, pending in ahead:
            yield oldest, place, pending.result()
    except TooManyBadSamplesError as error:
        raise ValueError(
            f"soft labels need every image: {error.__cause__}; repair the shards (`shards repair`)"
        ) from error


def finish(folder: Path, plan: store.LabelPlan) -> bool:
    """Write header.json when all units are there; False when some are missing."""
    units = list(plan.units())
    if not all((folder / plan.file_name(unit)).exists() for unit in units):
        return False
    for leftover in folder.glob("*.tmp"):  # of a writer that was killed
        # Ranks that finish together all come here: one may be at its header, and another have cleaned up.
        if not leftover.name.startswith(f"{store.HEADER_NAME}."):
            leftover.unlink(missing_ok=True)
    parts = [store.read_header(folder, plan, unit)[0]["coverage_sums"] for unit in units]
    # A store that was begun before a figure was measured does not have it.
    sums = Counter({name: sum(part[name] for part in parts) for name in set.intersection(*map(set, parts))})
    write_whole(folder / store.HEADER_NAME, store.render_header(plan, mean_coverage(sums)))
    return True


def mean_coverage(sums: Counter[str]) -> dict[str, float]:
    """Means over the views from their sums."""
    return {name: value if name == "views" else value / sums["views"] for name, value in sums.items()}
