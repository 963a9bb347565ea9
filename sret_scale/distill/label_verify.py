"""Asks the teacher of a store again about some of its records."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from shlex import quote

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.checked_files import parse_checked
from data_pipelines.config import DataConfig
from data_pipelines.image.view import VIEW_FIELDS
from data_pipelines.keyed_random import keyed_permutation
from data_pipelines.labels.store import LabelPlan, LabelStore, check_labels
from data_pipelines.shards.index import ShardSet
from data_pipelines.stream.prefetch import Batch, BatchFiller
from data_pipelines.stream.quarantine import Quarantine
from data_pipelines.stream.reader import ShardReader
from data_pipelines.stream.samples import TrainingSamples
from sret_scale.distill.label_teacher import StoredTeacher
from sret_scale.distill.networks import LoadRun
from sret_scale.distill.spec import parse_teacher
from sret_scale.distill.teacher import Teacher, build_teacher


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """How far stored probabilities are from the teacher's of now, at the worst record."""

    num_records: int
    largest_difference: float
    worst_key: str
    worst_view: int


def plan_teacher(plan: LabelPlan, spec: str | None, device: torch.device, load_run: LoadRun) -> Teacher:
    """The teacher of a plan, built again (from `spec` when it was moved). ValueError when it is another one now.

    A plan is data: the code that it names runs only where `spec` repeats it.
    """
    members = plan.members
    written = "+".join(member["spec"] for member in members)
    if spec is None and any(part.kind == "module" for part in parse_teacher(written)):
        raise ValueError(f"the store's teacher is code, which runs only when you say so: --teacher {quote(written)}")
    teacher = build_teacher(
        spec or written,
        num_classes=plan.num_classes,
        device=device,
        load_run=load_run,
        precision=members[0]["precision"],
    )
    now = teacher.describe()
    there = now.get("members", [now])
    if len(there) != len(members):
        raise ValueError(
            f"the labels were written by {len(members)} teachers, --teacher names {len(there)}; name the same ones"
        )
    for member, member_now in zip(members, there, strict=True):
        differing = [name for name, value in member.items() if name != "spec" and value != member_now[name]]
        if differing:
            raise ValueError(
                f"teacher {member['spec']!r} has changed since the labels were written: {', '.join(differing)} differ; "
                "bring that one back, or write the labels again"
            )
    return teacher


def verify_records(
    store: LabelStore,
    shards: ShardSet,
    teacher: Teacher,
    *,
    num_records: int,
    seed: int,
    transform: str | None = None,
) -> VerifyResult:
    """Compare `num_records` random records, of the classes that they keep.

    ValueError for a store of other shards, and for one whose views have a transform that `transform` does not repeat.
    """
    data = plan_data(store.plan)
    if data.transform and data.transform != transform:
        raise ValueError(
            "the store's views were drawn with code of yours, which runs only when you say so: "
            f"--transform {quote(data.transform)}"
        )
    check_labels(store, shards, data, run_seed=0)
    stored = StoredTeacher(store)
    total = shards.num_samples * store.plan.num_views
    chosen = np.sort(keyed_permutation(total, "verify", seed)[:num_records])
    worst = (-1.0, 0, 0)
    for batch in _batches(store.plan, shards, data, chosen):
        kept_BC = stored.probabilities(batch)
        live_BC = teacher(batch.images.to(teacher.device).float() / 255).softmax(dim=-1).cpu()
        ids_BK = torch.from_numpy(store.read(batch.indices.numpy(), batch.view_numbers.numpy())["ids"].astype(np.int64))
        difference_B = (kept_BC - live_BC).abs().gather(1, ids_BK).amax(dim=1)
        row = int(difference_B.argmax())
        worst = max(worst, (float(difference_B[row]), int(batch.indices[row]), int(batch.view_numbers[row])))
    return VerifyResult(
        num_records=len(chosen), largest_difference=worst[0], worst_key=shards.key(worst[1]), worst_view=worst[2]
    )


def plan_data(plan: LabelPlan) -> DataConfig:
    """The data settings that draw the views of a plan."""
    settings = {name: value for name, value in plan.view.items() if name not in ("version", "seed")}
    unknown = [name for name in settings if name not in VIEW_FIELDS]
    if unknown:
        raise ValueError(f"the store's plan.json: view: {unknown[0]!a} is no setting of a view")
    text = json.dumps({**settings, "view_seed": plan.view.get("seed"), "num_views": plan.num_views})
    return parse_checked(text.encode(), DataConfig, "the store's plan.json: view")


def _batches(plan: LabelPlan, shards: ShardSet, data: DataConfig, chosen: NDArray[np.int64]) -> Iterator[Batch]:
    """The views `chosen` (view * number of samples + sample), a batch of one view at a time."""
    strict = Quarantine(None, max_bad_rate=0.0, samples_per_epoch=shards.num_samples)
    with ShardReader(shards) as reader:
        source = TrainingSamples(reader, shards, data, seed=0, on_bad_sample=strict.add)
        with BatchFiller(
            source,
            row_shape=(3, plan.image_size, plan.image_size),
            num_threads=data.workers,
            stall_s=data.stall_s,
            in_progress=reader.in_progress,
        ) as filler:
            for view in np.unique(chosen // shards.num_samples).tolist():
                indices = chosen[chosen // shards.num_samples == view] % shards.num_samples
                for start in range(0, len(indices), plan.batch_size):
                    indices_B = indices[start : start + plan.batch_size]
                    yield filler.submit(view, indices_B, np.zeros_like(indices_B)).result()
