"""The records of a run: each goes to metrics.jsonl, and to the trackers of `train.trackers`, on rank 0.

A tracker is a function of the run's folder. It gives a context manager, and that gives what is called with each record:
a dict, as it stands in a line of metrics.jsonl. `tensorboard` and `wandb` are two of them, `module:function` is yours.
"""

import contextlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_pipelines.atomic_files import write_whole
from data_pipelines.extras import install_extra
from data_pipelines.user_functions import function_of_user
from sret_scale.config.run_config import read_yaml
from sret_scale.runs.rank_errors import in_words

Take = Callable[[dict[str, Any]], None]
Tracker = Callable[[Path], contextlib.AbstractContextManager[Take]]


@dataclass(frozen=True, kw_only=True)
class MetricsLog:
    """Who takes the records: metrics.jsonl and trackers by their name; nobody on the ranks that write nothing."""

    stream: IO[str] | None = None
    takers: dict[str, Take] = field(default_factory=dict)
    is_continued: bool = False

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line, handed to the operating system at once; `values` has `images`, the clock."""
        if self.stream is None:
            return
        self.stream.write(json.dumps({"kind": kind, **values}) + "\n")
        self.stream.flush()
        for name, take in list(self.takers.items()):
            try:
                take({"kind": kind, **values})
            except Exception as error:
                # Whatever a tracker raises must not end the run that it watches.
                print(f"tracker {name} gets no more records: {in_words(error)}", flush=True)
                del self.takers[name]


def open_metrics(file: Path, trackers: Sequence[str], stack: contextlib.ExitStack) -> MetricsLog:
    """metrics.jsonl and trackers, until the stack ends."""
    is_continued = file.exists() and file.stat().st_size > 0
    was_cut = is_continued and not file.read_bytes().endswith(b"\n")
    stream = stack.enter_context(file.open("a", encoding="utf-8"))
    if was_cut:
        # A line that a kill cut off is ended, so that it cannot swallow the next one.
        stream.write("\n")
    takers = {name: stack.enter_context(_open(name, file.parent)) for name in trackers}
    opened = {name: take for name, take in takers.items() if take}
    return MetricsLog(stream=stream, takers=opened, is_continued=is_continued)


@contextlib.contextmanager
def _open(name: str, folder: Path) -> Iterator[Take | None]:
    """A tracker from its begin to its end, neither of which may end the run; None where it does not begin.

    ValueError for what is no tracker.
    """
    tracker, opened, take = tracker_of(name), contextlib.ExitStack(), None
    try:
        context = tracker(folder)
        if not hasattr(context, "__enter__"):
            raise ValueError(
                f"train.trackers: {name} gave a {type(context).__name__}: expected a context manager that gives what "
                "is called with each record, such as a function under @contextlib.contextmanager makes"
            )
        take = opened.enter_context(context)
    except ValueError:
        raise
    except Exception as error:
        print(f"tracker {name} gets no records: {in_words(error)}", flush=True)
    try:
        yield take
    finally:
        try:
            opened.__exit__(*sys.exc_info())
        except Exception as error:
            print(f"tracker {name} failed at its end: {in_words(error)}", flush=True)


def tracker_of(name: str) -> Tracker:
    """The tracker of a name; ValueError with what to do where there is none."""
    if name not in _OWN and ":" not in name:
        raise ValueError(f"train.trackers: expected tensorboard, wandb or module:function, got {name!r}")
    if name not in _OWN:
        tracker: Tracker = function_of_user(name, f"train.trackers: {name}")
        return tracker
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"train.trackers: {name} needs the {name} extra: {install_extra(name)}")
    return _OWN[name]


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, nested ones too, under names such as `eval/ema/top1`; not lists, nor `images`."""
    prefix = f"{record['kind']}/{record['weights']}" if "weights" in record else record["kind"]
    return {f"{prefix}/{name}": value for name, value in _scalars(record) if name != "images"}


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _scalars(value))
        elif isinstance(value, int | float):
            yield name, value


@contextlib.contextmanager
def _tensorboard(folder: Path) -> Iterator[Take]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as events:

        def take(record: dict[str, Any]) -> None:
            for name, value in numbers_of(record).items():
                events.add_scalar(name, value, record["images"])

        yield take


@contextlib.contextmanager
def _wandb(folder: Path) -> Iterator[Take]:
    """Every start of a run is the same one there, and the runs of a sweep are a group."""
    import wandb

    identity = folder / "wandb" / "id"
    if not identity.exists():
        identity.parent.mkdir(exist_ok=True)
        write_whole(identity, uuid.uuid4().hex[:8])
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", "sret-scale"),
        group=folder.parent.name if (folder.parent / ".sweep").is_dir() else None,
        name=folder.name,
        id=identity.read_text(encoding="ascii"),
        resume="allow",
        dir=folder,
        config=read_yaml(folder / "config.yaml"),
        # What is printed stays where it is.
        settings=wandb.Settings(console="off"),
    ) as run:
        # Its own step may never go back, as it does where a run continues from a checkpoint.
        run.define_metric("*", step_metric="images")
        yield lambda record: run.log({"images": record["images"], **numbers_of(record)})


_OWN: dict[str, Tracker] = {"tensorboard": _tensorboard, "wandb": _wandb}
