"""Index and manifest for webdataset tars that someone else wrote; the tars stay as they are.

*.tar, in parallel -> strict scan, checksums, image headers -> index.npz, manifest.json
"""

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.shards.hashes import DEFAULT_HASH, hash_bytes
from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.shards.manifest import MANIFEST_NAME, Manifest
from data_pipelines.shards.tar_scan import TarError, TarSample, describe_passed_over, mapped, scan_samples
from data_pipelines.shards.tar_write import frame_crc
from data_pipelines.sources.listing import check_labels
from data_pipelines.sources.tars import class_names_of, image_member, label_of, tar_paths
from data_pipelines.stream.processes import Progress, run_jobs
from data_pipelines.writing.finish import finish_shards
from data_pipelines.writing.image_header import read_header
from data_pipelines.writing.rows import DoneShard, RowTable

logger = logging.getLogger(__name__)


def index_shards(
    folder: str | Path,
    *,
    num_workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Makes index and manifest for the tars in `folder`, in the order of their names.

    Raises ValueError for a tar or a sample that training could not read, with its offset and what to do.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists() or (folder / WORK_FOLDER).exists():
        raise ValueError(
            f"{folder}: has a manifest or a plan already; check it with `sret-scale shards verify {folder}`"
        )
    paths = tar_paths(folder)
    done: dict[int, DoneShard] = {}
    num_samples = num_bytes = 0
    passed_over: Counter[str] = Counter()
    for number, (shard, others) in run_jobs(_Worker, (paths,), range(len(paths)), num_workers):
        done[number] = shard
        passed_over += others
        num_samples, num_bytes = num_samples + shard.num_samples, num_bytes + shard.bytes
        # The number of samples is not known before the end: what is left is guessed from the shards read so far.
        total = num_samples * len(paths) // len(done)
        on_progress(Progress(samples=num_samples, bytes=num_bytes, total_samples=total))
    if passed_over:
        logger.warning("%s: %s", folder, describe_passed_over(passed_over))
    shards = [done[number] for number in range(len(paths))]
    label = np.concatenate([shard.columns["label"] for shard in shards])
    if not len(label):
        raise ValueError(f"{folder}: no samples in its tars")
    class_names = class_names_of(folder, label.tolist())
    check_labels(label, class_names, folder)
    return finish_shards(folder, shards, class_names=class_names, writer={"kind": "foreign"})


class _Worker:
    """Reads one of the tars."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __call__(self, number: int) -> tuple[DoneShard, Counter[str]]:
        path = self._paths[number]
        with mapped(path) as data:
            try:
                passed_over: Counter[str] = Counter()
                return _read_shard(path.name, data, passed_over), passed_over
            except TarError as error:
                raise ValueError(f"{path}: at offset {error.offset}: {error.reason}; get the file again") from error


def _read_shard(name: str, data: memoryview, passed_over: Counter[str]) -> DoneShard:
    samples = list(scan_samples(data, passed_over))
    ends = [sample.start for sample in samples[1:]] + [_end(samples)]
    rows = RowTable()
    for sample, end in zip(samples, ends, strict=True):
        member = image_member(sample)
        image = bytes(data[member.offset : member.offset + member.size])
        try:
            header = read_header(image)
        except BadImageError as error:
            advice = "write the good samples to a new set with `sret-scale shards write tars ... --on-bad skip`"
            raise TarError(member.offset, f"sample {sample.key!r}: {error}; {advice}") from error
        rows.add(
            sample.key,
            offset=member.offset,
            length=member.size,
            label=label_of(sample, data),
            crc=zlib.crc32(image),
            width=header.width,
            height=header.height,
            record_offset=sample.start,
            frame_crc=frame_crc(data[sample.start : member.offset], data[member.offset + member.size : end]),
        )
    return DoneShard(
        file=name,
        bytes=len(data),
        hash=hash_bytes(data, DEFAULT_HASH),
        end=_end(samples),
        columns=rows.columns(),
        rejected=[],
    )


def _end(samples: Sequence[TarSample]) -> int:
    """Where the last member of a shard ends."""
    return max(member.end for member in samples[-1].members.values()) if samples else 0
