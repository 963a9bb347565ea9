"""Index and manifest for webdataset tars that someone else wrote; the tars stay as they are, and where they are.

*.tar, in parallel -> strict scan, checksums, image headers -> index.npz, manifest.json
"""

import logging
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.image.pillow_door import BadImageError
from data_pipelines.remote.shard_sets import remote_folder
from data_pipelines.shards.hashes import DEFAULT_HASH, hash_bytes
from data_pipelines.shards.index import WORK_FOLDER
from data_pipelines.shards.manifest import MANIFEST_NAME, Manifest, tar_name
from data_pipelines.shards.tar_scan import TarError, TarSample, describe_passed_over, mapped, scan_samples
from data_pipelines.shards.tar_write import frame_crc
from data_pipelines.sources.listing import CLASSES_FILE, check_labels
from data_pipelines.sources.tars import class_names_of, image_member, label_of, tar_paths
from data_pipelines.stream.processes import Progress, run_jobs
from data_pipelines.writing.finish import finish_shards
from data_pipelines.writing.image_header import read_header
from data_pipelines.writing.rows import DoneShard, RowTable

logger = logging.getLogger(__name__)


def index_shards(
    source: str | Path,
    output: str | Path | None = None,
    *,
    num_workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Makes index and manifest for the tars of `source`, in the order of their names, or of webdataset's pattern.

    They are written into `output`, which remembers where the tars are; without it, beside the tars of a folder.
    Raises ValueError for a tar or a sample that training could not read, with its offset and what to do.
    """
    if output is None and not Path(source).is_dir():
        raise ValueError(
            f"{source}: expected an existing folder of tars, to write the index beside them, got a pattern, a URL or no"
            " folder; say where the index goes: --output FOLDER"
        )
    folder = Path(source if output is None else output)
    if (folder / MANIFEST_NAME).exists() or (folder / WORK_FOLDER).exists():
        raise ValueError(
            f"{folder}: has a manifest or a plan already; check it with `sret-scale shards verify {folder}`"
        )
    location, names = _tars_of(str(source))
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[int, DoneShard] = {}
    num_samples = num_bytes = 0
    passed_over: Counter[str] = Counter()
    for number, (shard, others) in run_jobs(_Worker, (location, names, folder), range(len(names)), num_workers):
        done[number] = shard
        passed_over += others
        num_samples, num_bytes = num_samples + shard.num_samples, num_bytes + shard.bytes
        # The number of samples is not known before the end: what is left is guessed from the shards read so far.
        total = num_samples * len(names) // len(done)
        on_progress(Progress(samples=num_samples, bytes=num_bytes, total_samples=total))
    if passed_over:
        logger.warning("%s: %s", location, describe_passed_over(passed_over))
    shards = [done[number] for number in range(len(names))]
    label = np.concatenate([shard.columns["label"] for shard in shards])
    if not len(label):
        raise ValueError(f"{location}: no samples in its tars")
    has_names = (folder / CLASSES_FILE).exists() or _is_remote(location)
    class_names = class_names_of(folder if has_names else Path(location), label.tolist())
    check_labels(label, class_names, folder)
    writer = {"kind": "foreign"} | ({"location": location} if output is not None else {})
    return finish_shards(folder, shards, class_names=class_names, writer=writer)


def _tars_of(source: str) -> tuple[str, list[str]]:
    """Where the tars of a folder, or of a pattern of webdataset's, lie, and their names."""
    if Path(source).is_dir():
        return str(Path(source).resolve()), [path.name for path in tar_paths(Path(source))]
    # It takes a second, which only a pattern should cost.
    from webdataset.shardlists import expand_urls

    urls = expand_urls(source)
    folders, names = {url.rpartition("/")[0] for url in urls}, [url.rpartition("/")[2] for url in urls]
    location = min(folders)
    if _is_remote(location):
        remote_folder(location, DataConfig())
    if len(folders) > 1 or len(set(names)) < len(names):
        raise ValueError(
            f"{source}: expected different tars of one folder, got {len(names)} of {len(folders)} folders; index each"
            " folder by itself, and train on all of them by data.mixture_folders"
        )
    return location if _is_remote(location) else str(Path(location).resolve()), list(map(tar_name, names))


def _is_remote(location: str) -> bool:
    return ":" in location.partition("/")[0]


class _Worker:
    """Reads one of the tars."""

    def __init__(self, location: str, names: Sequence[str], folder: Path) -> None:
        self._location, self._names, self._folder = location, names, folder

    def __call__(self, number: int) -> tuple[DoneShard, Counter[str]]:
        name = self._names[number]
        with self._local(name) as path, mapped(path) as data:
            try:
                passed_over: Counter[str] = Counter()
                return _read_shard(name, data, passed_over), passed_over
            except TarError as error:
                where = f"{self._location}/{name}"
                raise ValueError(f"{where}: at offset {error.offset}: {error.reason}; get the file again") from error

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        """The tar as a file; one of a server is here for as long as it is read."""
        if not _is_remote(self._location):
            yield Path(self._location) / name
            return
        with tempfile.TemporaryDirectory(prefix=".indexing-", dir=self._folder) as temporary:
            remote_folder(self._location, DataConfig()).download_unknown(name, Path(temporary) / name)
            yield Path(temporary) / name


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
