"""Image sources to webdataset shards: list, plan, write, finish.

    source -> Listing -> Plan -> shard tars with done-markers -> index.npz, manifest.json

Until the manifest appears, everything that a restart needs lies in TARGET/.writing: the plan and a marker for each
complete shard. The same command continues, and the result has the same bytes as an uninterrupted run.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic_files import write_whole
from data_pipelines.grids.made import GridOptions, GridReader
from data_pipelines.shards.classes import check_same_classes, numbers_of
from data_pipelines.shards.hashes import DEFAULT_HASH, HASH_NAMES, hash_name_of
from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.shards.manifest import INDEX_BYTES_A_SAMPLE, MANIFEST_NAME, Manifest, max_index_bytes, read_manifest
from data_pipelines.sources.kinds import source_kind
from data_pipelines.sources.listing import Listing
from data_pipelines.sources.pairs import kept_texts
from data_pipelines.stream.processes import Progress
from data_pipelines.text.pieces import KIND, PAIR_KINDS, TextWindows
from data_pipelines.text.tokens import TOKENS_HASH, TOKENS_NAME, tokens_sha256, train_pieces
from data_pipelines.writing.finish import check_sizes, finish_shards
from data_pipelines.writing.prepare import ImageOptions
from data_pipelines.writing.rows import DoneShard, done_path, load_done
from data_pipelines.writing.shard_plan import PLAN_NAME, Plan, load_plan, make_plan, save_plan
from data_pipelines.writing.workers import check_bad_rate, claim, write_missing

DEFAULT_SHARD_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """What shards are made of and how. `seed` None keeps the source's order; `shard_samples` beats `shard_bytes`.

    `source`: a path, or what is to be made, for the kinds that make their samples.

    `class_names`: those of the training set, whose numbers the labels get; None takes the source's own.
    `hash_name` is how the manifest knows the tars again (`data_pipelines.shards.hashes`). `text`: of the kind text,
    how it is cut. `vocabulary`: of pairs, how many tokens a sentencepiece model has that is trained on both sides and
    stands in the set (tokens.model); None trains none.
    """

    kind: str
    source: Path | GridOptions
    split: str | None = None
    seed: int | None = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES
    shard_samples: int | None = None
    options: ImageOptions = field(default_factory=ImageOptions)
    hash_name: str = DEFAULT_HASH
    class_names: tuple[str, ...] | None = None
    text: TextWindows | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if (source_kind(self.kind).open_reader is GridReader) != isinstance(self.source, GridOptions):
            raise ValueError(
                f"source {self.source}: expected GridOptions for mazes and products, a path for other kinds"
            )
        if (self.kind in (KIND, *PAIR_KINDS)) != (self.text is not None):
            raise ValueError(f"kind {self.kind}: expected TextWindows for text and for nothing else, got {self.text}")
        for name in ("shard_bytes", "shard_samples", "vocabulary"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if self.vocabulary is not None and self.kind not in PAIR_KINDS:
            raise ValueError(f"kind {self.kind}: expected no vocabulary but for pairs, got {self.vocabulary}")
        if self.hash_name not in HASH_NAMES:
            raise ValueError(f"hash {self.hash_name!r}: expected one of {', '.join(HASH_NAMES)}")

    def record(self) -> dict[str, Any]:
        """The arguments as the manifest keeps them: no paths of this machine, so that equal sets are equal bytes.

        The hash is not among them, as it changes no image and stands beside each tar.
        """
        fields = asdict(self)
        del fields["hash_name"]
        for name in ("text", "vocabulary"):
            if fields[name] is None:
                del fields[name]
        names = fields.pop("class_names")
        if names is not None:
            fields["classes"] = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        return fields | ({"source": self.source.resolve().name} if isinstance(self.source, Path) else {})


def write_shards(
    config: WriteConfig,
    target: str | Path,
    *,
    num_workers: int = 1,
    max_bad_rate: float = 0.01,
    list_samples: Callable[[], Listing] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Writes the shard set, or continues one that was interrupted; returns the manifest of the complete set.

    `list_samples` takes the place of the kind's own listing. Any number of processes on any number of nodes may call
    this at once with the same arguments. Raises ValueError or OSError with what to do: a bad source or image, more than
    a share of `max_bad_rate` of bad images, a target that holds something else, a full disk.
    """
    target = Path(target)
    if not 0 <= max_bad_rate <= 1:
        raise ValueError(f"max_bad_rate: expected 0 to 1, got {max_bad_rate:g}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: a file, expected a folder to write the shards into; choose another target")
    if not (target / MANIFEST_NAME).exists():
        try:
            _write(config, target, list_samples, num_workers, max_bad_rate, on_progress)
        except OSError as error:
            # Another node may have finished the set and removed the plan under this one, or under its workers.
            if (target / MANIFEST_NAME).exists():
                return _already_complete(config, target)
            if error.errno not in _FULL_DISK:
                raise
            advice = f"{error.strerror}; make room and run the same command again, it keeps what is complete"
            raise OSError(error.errno, advice, error.filename) from error
    return _already_complete(config, target)


def _write(
    config: WriteConfig,
    target: Path,
    list_samples: Callable[[], Listing] | None,
    num_workers: int,
    max_bad_rate: float,
    on_progress: Callable[[Progress], None],
) -> None:
    work = target / WORK_FOLDER
    # Nothing is made before the source was listed: a wrong argument must not leave an empty target behind. Nodes that
    # begin together list together, and the first one's plan holds.
    plan, tokens = None, None
    if not (work / PLAN_NAME).exists():
        plan, tokens = _new_plan(config, target, list_samples), _trained_tokens(config)
    work.mkdir(parents=True, exist_ok=True)
    with claim(work / "plan.lock", wait=True):
        if (target / MANIFEST_NAME).exists():
            # Another node has finished the set while this one listed the source.
            return
        if (work / PLAN_NAME).exists():
            plan = _plan_there(config, target)
        else:
            if plan is None:
                plan, tokens = _new_plan(config, target, list_samples), _trained_tokens(config)
            if tokens is not None:
                write_whole(target / TOKENS_NAME, tokens)
            save_plan(plan, work)
    write_missing(
        plan,
        target,
        options=config.options,
        num_workers=num_workers,
        max_bad_rate=max_bad_rate,
        on_progress=on_progress,
    )
    with claim(work / "finish.lock", wait=True):
        if not (target / MANIFEST_NAME).exists():
            shards = [_load_complete(target, index) for index in range(plan.num_shards)]
            check_bad_rate(sum(len(shard.rejected) for shard in shards), len(plan.listing), max_bad_rate, target)
            num_turned = sum(shard.num_turned for shard in shards)
            if num_turned:
                logger.warning(
                    "%s: %s images are to be turned before they are shown (EXIF), and are learned as they are stored; "
                    "--resize turns them",
                    *(target, f"{num_turned:,}"),
                )
            names, members = plan.listing.class_names, plan.listing.members
            # Together with what was asked for, what it gave.
            known = {TOKENS_HASH: tokens_sha256(target / TOKENS_NAME)} if config.vocabulary else {}
            finish_shards(target, shards, class_names=names, writer=config.record() | known, members=members)


def _trained_tokens(config: WriteConfig) -> bytes | None:
    if config.vocabulary is None:
        return None
    assert isinstance(config.source, Path) and config.text is not None
    return train_pieces(kept_texts(config.source, config.text.window), config.vocabulary)


def _load_complete(target: Path, index: int) -> DoneShard:
    """The done-marker of a shard whose tar still has the size that was written."""
    shard = load_done(target, index)
    path = target / shard.file
    if path.stat().st_size != shard.bytes:
        done_path(target, index).unlink()
        raise ValueError(f"{path}: changed while the other shards were written; run the same command again to redo it")
    return shard


def _plan_there(config: WriteConfig, target: Path) -> Plan:
    """The plan that is in the target already. Raises ValueError when it was made with other arguments."""
    work = target / WORK_FOLDER
    plan, arguments = load_plan(work), _plan_arguments(config)
    if plan.arguments["options"]["on_bad"] == "fail":
        # What was written under this policy has left nothing out: its shards are the same under every other.
        arguments["options"] = {**arguments["options"], "on_bad": "fail"}
    if changed := _changed(plan.arguments, arguments):
        raise ValueError(
            f"{target}: holds a half-finished shard set made with another {', '.join(changed)}; repeat those,"
            f" choose another target, or delete {work}"
        )
    return plan


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs; of groups, such as the options of images, those inside."""
    found: list[str] = []
    for name in {*before, *now}:
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _changed(one, other)
        elif one != other:
            found.append(name)
    return sorted(found)


def _plan_arguments(config: WriteConfig) -> dict[str, Any]:
    arguments = {**config.record(), "hash_name": config.hash_name}
    return arguments | ({"source": str(config.source.resolve())} if isinstance(config.source, Path) else {})


def _new_plan(config: WriteConfig, target: Path, list_samples: Callable[[], Listing] | None) -> Plan:
    """The plan of the source. Raises ValueError when the target holds tars that belong to no plan."""
    strangers = sorted(path.name for path in target.glob("*.tar"))
    # Looked for after the tars, so that those of another node that has just planned are not taken for strangers.
    has_owner = (target / WORK_FOLDER / PLAN_NAME).exists() or (target / MANIFEST_NAME).exists()
    if strangers and not has_owner:
        raise ValueError(f"{target}: already holds {strangers[0]} of something else; choose an empty target")
    if list_samples is not None:
        listing = list_samples()
    else:
        source = (config.source, config.text) if config.text else config.source
        listing = source_kind(config.kind).list_samples(source, config.split)
    if config.class_names is not None:
        listing = _renamed(listing, config.class_names, config.source)
    if listing.members and config.options.resize:
        raise ValueError(f"{config.source}: images with label maps are not resized; leave out --resize")
    plan = make_plan(
        listing,
        _plan_arguments(config),
        # What is made has an order of its own: twins stand together.
        seed=config.seed if isinstance(config.source, Path) else None,
        shard_bytes=config.shard_bytes,
        shard_samples=config.shard_samples,
    )
    # What would be refused after hours of writing is refused now: columns and keys; for each shard 256 bytes and a
    # number for each class, and the classes' names.
    index_bytes = (INDEX_BYTES_A_SAMPLE + 20 * len(listing.members)) * len(listing) + len(listing.keys.blob)
    manifest_bytes = plan.num_shards * (256 + 4 * len(listing.class_names)) + len(json.dumps(listing.class_names))
    check_sizes(index_bytes, max_index_bytes(len(listing)), manifest_bytes)
    return plan


def _renamed(listing: Listing, class_names: tuple[str, ...], source: Path | GridOptions) -> Listing:
    """The listing with these classes, found by name; names that are only numbers, and none of these, are theirs."""
    names = listing.class_names
    if listing.members:
        check_same_classes(names, class_names, where=str(source), owner="those given")
        return listing
    if not set(names) & set(class_names) and all(name.isdecimal() and int(name) < len(class_names) for name in names):
        logger.warning("%s: its classes have numbers for names: taken for those of the given classes", source)
        numbers = np.array([int(name) for name in names], np.int32)
    else:
        numbers = numbers_of(names, class_names, str(source), "those given")
    return replace(listing, class_names=list(class_names), label=numbers[listing.label])


def _already_complete(config: WriteConfig, target: Path) -> Manifest:
    """The manifest of a target that was written with the same arguments; anything else is refused."""
    manifest = read_manifest(target)
    record = config.record()
    if changed := _changed({name: value for name, value in manifest.writer.items() if name != TOKENS_HASH}, record):
        raise ValueError(
            f"{target}: holds a complete shard set made with another {', '.join(changed)}; choose another target"
        )
    weak = config.hash_name == "sha256" and any(hash_name_of(shard.hash) != "sha256" for shard in manifest.shards)
    if weak:
        raise ValueError(f"{target}: holds a complete shard set made with another hash; choose another target")
    tokens, known = target / TOKENS_NAME, manifest.writer.get(TOKENS_HASH)
    if known is not None and known != tokens_sha256(tokens if tokens.is_file() else None):
        raise ValueError(f"{tokens} is gone or has changed: remove {target}, and write the set again")
    _remove_work(target)
    return manifest


def _remove_work(target: Path) -> None:
    """Removes the plan and the markers. Renamed first, so that no other node finds half of them."""
    removed = target / f"{WORK_FOLDER}.removed.{os.uname().nodename}.{os.getpid()}"
    try:
        (target / WORK_FOLDER).rename(removed)
    except FileNotFoundError:
        return
    shutil.rmtree(removed)
