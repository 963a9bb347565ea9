"""A folder of soft labels: what was planned, which files it has, and the records of a batch.

plan.json      what is to be written; written first, and never changed
SHARD.views-FIRST-LAST.labels      one unit of work: these views of one image shard
header.json    the plan and the coverage; written when all units are there, so its absence means "unfinished"
"""

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Required, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import TypedDict

from data_pipelines.checked_files import PlainName, read_checked
from data_pipelines.config import DataConfig
from data_pipelines.image.view import view_settings
from data_pipelines.labels.records import Records, parse_header, record_dtype
from data_pipelines.shards.index import ShardSet

FORMAT: Literal["sret_scale soft labels"] = "sret_scale soft labels"
PLAN_NAME, HEADER_NAME = "plan.json", "header.json"
# A header is a few hundred bytes, and a dozen more a view.
_HEADER_READ_BYTES = 1 << 16
# Repeated augmentation needs as many views at once as it has repeats; each is 51 bytes a sample at K = 10.
_MAX_VIEWS_IN_MEMORY = 8
_AGAIN = "run the same `sret-scale labels write` command again"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Views `first_view` to `last_view` (included) of the image shard number `shard`."""

    shard: int
    first_view: int
    last_view: int


class _Member(TypedDict):
    spec: str
    weights_sha256: str
    image_size: int
    interpolation: str
    # A whole number stays one: the plan's hash is that of its text.
    mean: list[int | float]
    std: list[int | float]
    precision: Literal["bf16", "fp32"]


class _Members(TypedDict):
    members: Annotated[list[_Member], Field(min_length=1)]


class _Coverage(TypedDict, total=False):
    views: Required[int | float]
    mass: Required[int | float]
    kl: Required[int | float]
    entropy: Required[int | float]
    top1_agreement: Required[int | float]
    gradient_cosine: int | float


class _Header(TypedDict):
    coverage: _Coverage


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """All that the bytes of a store depend on. `fingerprint` is the image shards', `view` says how views are drawn."""

    format: Literal["sret_scale soft labels"] = FORMAT
    fingerprint: str
    shards: list[tuple[PlainName, Annotated[int, Field(ge=0)]]]
    num_classes: int
    top_k: int
    num_views: int
    views_per_file: int
    batch_size: int
    image_size: int
    teacher: _Member | _Members
    view: dict[str, Any]

    def __post_init__(self) -> None:
        for name, value, most in (
            ("classes", self.num_classes, 1 << 16),
            ("top_k", self.top_k, self.num_classes),
            ("views", self.num_views, 1 << 20),
            ("views_per_file", self.views_per_file, self.num_views),
            ("batch_size", self.batch_size, 1 << 20),
            ("image_size", self.image_size, 1 << 16),
            ("files", len(self.shards) * -(-self.num_views // max(1, self.views_per_file)), 1 << 22),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"soft labels: expected {name} from 1 to {most}, got {value}")

    @property
    def members(self) -> list[_Member]:
        """The descriptions of the teachers, of which there may be several."""
        members: list[_Member] = cast(Any, self.teacher).get("members", [self.teacher])
        return members

    def units(self) -> Iterator[Unit]:
        """The units of work, in their fixed order. A shard without samples has none."""
        for shard, (_, num_samples) in enumerate(self.shards):
            for first in range(0, self.num_views if num_samples else 0, self.views_per_file):
                last = min(first + self.views_per_file, self.num_views) - 1
                yield Unit(shard=shard, first_view=first, last_view=last)

    def file_name(self, unit: Unit) -> str:
        """Name of a unit's file, e.g. `shard-000003.views-00000-00003.labels`."""
        return f"{Path(self.shards[unit.shard][0]).stem}.views-{unit.first_view:05d}-{unit.last_view:05d}.labels"

    def to_json(self) -> str:
        """The text of plan.json: the same for the same plan."""
        return json.dumps(asdict(self), sort_keys=True, indent=1) + "\n"

    @cached_property
    def sha256(self) -> str:
        """Hex digest that every file of the store carries."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_plan(folder: Path) -> LabelPlan:
    """The plan of a store, finished or not. Raises FileNotFoundError or ValueError."""
    path = folder / PLAN_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no store of soft labels; make one with `sret-scale labels write`")
    try:
        return read_checked(path, LabelPlan)
    except ValueError as error:
        raise ValueError(f"{error}; not a plan of this format, or damaged: write the labels again") from error


def read_header(folder: Path, plan: LabelPlan, unit: Unit) -> tuple[dict[str, Any], int]:
    """(header, offset of the records) of a unit's file, header and size checked. Raises ValueError or OSError."""
    path = folder / plan.file_name(unit)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {_AGAIN}")
    with path.open("rb") as file:
        head = file.read(_HEADER_READ_BYTES)
    try:
        header, offset = parse_header(head, path.stat().st_size)
        sizes = len(header["view_crc32"]), header["num_samples"], header["record_bytes"]
        planned = unit.last_view - unit.first_view + 1, plan.shards[unit.shard][1], record_dtype(plan.top_k).itemsize
        if sizes != planned:
            raise ValueError(f"views, samples and bytes a record {sizes}, the plan has {planned}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it and {_AGAIN}") from error
    if header["plan_sha256"] != plan.sha256:
        raise ValueError(f"{path}: belongs to another store than {PLAN_NAME} beside it; remove it and {_AGAIN}")
    return header, offset


def read_view(folder: Path, plan: LabelPlan, unit: Unit, view: int) -> Records:
    """The records of one view in a unit, in the order of the shard, with their checksum checked."""
    header, offset = read_header(folder, plan, unit)
    num_bytes = header["num_samples"] * header["record_bytes"]
    place = view - unit.first_view
    # Not mapped: a map keeps its file open, and an epoch over ImageNet touches 1,282 files.
    with (folder / plan.file_name(unit)).open("rb") as file:
        file.seek(offset + place * num_bytes)
        data = file.read(num_bytes)
    if zlib.crc32(data) != header["view_crc32"][place]:
        raise ValueError(
            f"{folder / plan.file_name(unit)}: the bytes of view {view} were changed; remove the file and {_AGAIN}"
        )
    return np.frombuffer(data, record_dtype(plan.top_k))


def check_files(folder: Path, plan: LabelPlan, *, rank: int = 0, world_size: int = 1) -> None:
    """Read every `world_size`-th file in full, from number `rank` on; ValueError or OSError at the first bad one."""
    for unit in list(plan.units())[rank::world_size]:
        for view in range(unit.first_view, unit.last_view + 1):
            read_view(folder, plan, unit, view)


class LabelStore:
    """An opened, finished store: `store.read(indices, views)`."""

    def __init__(self, folder: Path, plan: LabelPlan, coverage: Mapping[str, float]) -> None:
        self.folder, self.plan, self.coverage = folder, plan, coverage
        self._starts = np.cumsum([0] + [num_samples for _, num_samples in plan.shards])
        # View -> its records of all samples, and which shards are filled in; the least recently used first.
        self._views: OrderedDict[int, tuple[Records, NDArray[np.bool_]]] = OrderedDict()

    def read(self, indices_B: NDArray[np.int64], views_B: NDArray[np.int64]) -> Records:
        """Records (B,) of the samples `indices_B` of the shard set, each of its view `views_B`.

        A shard's view is read as a whole and checked when it is first needed, and kept while few others are used.
        """
        records = np.empty(len(indices_B), record_dtype(self.plan.top_k))
        shards_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        for view in np.unique(views_B).tolist():
            rows = views_B == view
            records[rows] = self._view(view, np.unique(shards_B[rows]))[indices_B[rows]]
        return records

    def _view(self, view: int, shards: NDArray[np.int64]) -> Records:
        """Records of all samples in which those of `shards` are filled in."""
        assert 0 <= view < self.plan.num_views
        if view not in self._views:
            while len(self._views) >= _MAX_VIEWS_IN_MEMORY:
                self._views.popitem(last=False)
            empty = np.empty(self._starts[-1], record_dtype(self.plan.top_k))
            self._views[view] = empty, np.zeros(len(self.plan.shards), np.bool_)
        self._views.move_to_end(view)
        records, is_filled = self._views[view]
        first = view - view % self.plan.views_per_file
        last = min(first + self.plan.views_per_file, self.plan.num_views) - 1
        for shard in shards[~is_filled[shards]].tolist():
            unit = Unit(shard=shard, first_view=first, last_view=last)
            records[self._starts[shard] : self._starts[shard + 1]] = read_view(self.folder, self.plan, unit, view)
            is_filled[shard] = True
        return records


def open_labels(folder: str | Path) -> LabelStore:
    """The store in a folder. Raises FileNotFoundError or ValueError when it is missing, unfinished or damaged."""
    folder = Path(folder)
    plan = read_plan(folder)
    path = folder / HEADER_NAME
    missing = [unit for unit in plan.units() if not (folder / plan.file_name(unit)).is_file()]
    if missing or not path.is_file():
        raise FileNotFoundError(f"{folder}: unfinished, {len(missing)} files are missing; {_AGAIN}")
    try:
        coverage = cast(dict[str, float], read_checked(path, _Header)["coverage"])
        if path.read_bytes() != render_header(plan, coverage):
            raise ValueError(f"it was changed, or {PLAN_NAME} beside it is another one")
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it and {_AGAIN}") from error
    return LabelStore(folder, plan, coverage)


def render_header(plan: LabelPlan, coverage: Mapping[str, float]) -> bytes:
    """The bytes of header.json, sealed with a hash of the rest."""
    header: dict[str, Any] = {"plan_sha256": plan.sha256, "coverage": dict(coverage)}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**header, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def label_view(data: DataConfig, run_seed: int) -> dict[str, Any]:
    """How views are drawn, as a plan holds it."""
    return {**view_settings(data), "seed": run_seed if data.view_seed is None else data.view_seed}


def check_labels(store: LabelStore, shards: ShardSet, data: DataConfig, run_seed: int) -> None:
    """Raise ValueError unless the store is of these shards and has the views that `data` asks for."""
    plan, folder = store.plan, store.folder
    if plan.num_classes != shards.num_classes:
        raise ValueError(
            f"{folder}: labels of {plan.num_classes} classes, the data has {shards.num_classes};"
            " write labels of these shards"
        )
    if plan.fingerprint != shards.fingerprint:
        raise ValueError(
            f"{folder}: labels of other shards than {shards.folder}: "
            f"fingerprint {plan.fingerprint[:12]}, expected {shards.fingerprint[:12]}; write labels of these shards"
        )
    view = label_view(data, run_seed)
    names = [name for name in sorted({*plan.view, *view}) if plan.view.get(name) != view.get(name)]
    if names:
        setting = {"seed": "view_seed", "version": "(version of the views)"}
        differing = ", ".join(f"data.{setting.get(name, name)}={plan.view.get(name)}" for name in names)
        raise ValueError(f"{folder}: labels of other views than this run draws; they need {differing}")
    if data.num_views is None or data.num_views > plan.num_views:
        asked = "new ones in every epoch" if data.num_views is None else data.num_views
        raise ValueError(
            f"{folder}: has {plan.num_views} views of each image, the run asks for {asked}; "
            f"set data.num_views={plan.num_views} or write more views"
        )
