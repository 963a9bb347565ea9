"""Reads a whole shard set and reports everything that is wrong with it, by shard, key, offset and reason.

    per shard, in parallel: size -> hash -> checksums of each sample -> tar structure -> labels -> decode each image

The index has a checksum of each image and one of what frames it (headers, label, padding), so that one flipped bit is
found and named wherever it is.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.shards.hashes import hash_bytes, hash_name_of
from data_pipelines.shards.index import MemberColumns, ShardSet, open_shards
from data_pipelines.shards.tar_scan import TarError, TarSample, mapped, scan_samples
from data_pipelines.shards.tar_write import frame_crc
from data_pipelines.stream.processes import Progress, run_jobs
from data_pipelines.text.pieces import TARGET
from data_pipelines.text.tokens import TOKENS_HASH, TOKENS_NAME


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong: `key` is empty where no sample is concerned, `offset` counts bytes in the shard."""

    shard: str
    key: str
    offset: int
    reason: str

    def __str__(self) -> str:
        sample = f" sample {self.key!r}" if self.key else ""
        return f"{self.shard}:{sample} at offset {self.offset}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is wrong in a shard, and the samples (rows of the index) that must not be used."""

    findings: list[Finding]
    bad_rows: list[int]


def verify_shards(
    folder: str | Path,
    *,
    num_workers: int = 1,
    decode: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Finding]:
    """Everything wrong in the set, in its order; empty when it is sound.

    Raises ValueError or FileNotFoundError when manifest or index are damaged: they say what is right.
    """
    shards = open_shards(folder, check_tars=False)
    verdicts = judge_shards(shards, num_workers=num_workers, decode=decode, on_progress=on_progress)
    of_shards = (finding for verdict in verdicts for finding in verdict.findings)
    return [*_changed_tokens(shards), *_duplicate_keys(shards), *of_shards]


def judge_shards(
    shards: ShardSet, *, num_workers: int, decode: bool, on_progress: Callable[[Progress], None]
) -> list[Verdict]:
    """The verdict on each shard, in order."""
    verdicts: dict[int, Verdict] = {}
    num_samples = num_bytes = 0
    for number, verdict in run_jobs(_Worker, (shards, decode), range(shards.num_shards), num_workers):
        verdicts[number] = verdict
        entry = shards.manifest.shards[number]
        num_samples, num_bytes = num_samples + entry.num_samples, num_bytes + entry.bytes
        on_progress(Progress(samples=num_samples, bytes=num_bytes, total_samples=shards.num_samples))
    return [verdicts[number] for number in range(shards.num_shards)]


class _Worker:
    """Verifies the shards of one set."""

    def __init__(self, shards: ShardSet, decode: bool) -> None:
        self._shards, self._decode = shards, decode

    def __call__(self, number: int) -> Verdict:
        return verify_shard(self._shards, number, decode=self._decode)


def verify_shard(shards: ShardSet, number: int, *, decode: bool) -> Verdict:
    """Everything wrong in one shard."""
    entry = shards.manifest.shards[number]
    try:
        with mapped(shards.folder / entry.file) as data:
            checker = _Checker(shards, number, data)
            checker.check(decode=decode)
            return Verdict(findings=checker.findings, bad_rows=sorted(checker.bad_rows))
    except FileNotFoundError:
        missing = Finding(shard=entry.file, key="", offset=0, reason="the shard is missing")
        return Verdict(findings=[missing], bad_rows=np.flatnonzero(shards.shard_of == number).tolist())


class _Checker:
    """Checks one shard; at most one finding for a sample, the most basic one."""

    def __init__(self, shards: ShardSet, number: int, data: memoryview) -> None:
        self.findings: list[Finding] = []
        self._shards = shards
        self._entry = shards.manifest.shards[number]
        self._data = data
        first, end = np.searchsorted(shards.shard_of, [number, number + 1]).tolist()
        self._rows = range(first, end)
        self.bad_rows: set[int] = set()

    def check(self, *, decode: bool) -> None:
        """Fills `findings`."""
        size = len(self._data)
        if size != self._entry.bytes:
            self._report_size(size)
        self._check_records()
        same = hash_bytes(self._data, hash_name_of(self._entry.hash)) == self._entry.hash
        if not same and not self.findings:
            self._report(None, self._entry.end, "the end of the shard has changed")
        self._check_structure()
        if decode:
            self._check_images()

    def _report(self, row: int | None, offset: int, reason: str) -> None:
        if row is not None:
            if row in self.bad_rows:
                return
            self.bad_rows.add(row)
        key = "" if row is None else self._shards.key(row)
        self.findings.append(Finding(shard=self._entry.file, key=key, offset=offset, reason=reason))

    def _report_size(self, size: int) -> None:
        lost = [row for row in self._rows if self._record_end(row) > size]
        self.bad_rows.update(lost)
        what = f"cut off, {len(lost)} samples lost" if size < self._entry.bytes else "bytes added at the end"
        key = self._shards.key(lost[0]) if lost else ""
        reason = f"{size:,} bytes, expected {self._entry.bytes:,}: {what}"
        self.findings.append(
            Finding(shard=self._entry.file, key=key, offset=min(size, self._entry.bytes), reason=reason)
        )

    def _record_end(self, row: int) -> int:
        last = row + 1 == self._rows.stop
        return self._entry.end if last else int(self._shards.record_offset[row + 1])

    def _part(self, row: int, place: ShardSet | MemberColumns) -> memoryview:
        """The image, or another member."""
        offset = int(place.offset[row])
        return self._data[offset : offset + int(place.length[row])]

    def _check_records(self) -> None:
        for row in self._rows:
            if row in self.bad_rows:
                continue
            start, image = int(self._shards.record_offset[row]), int(self._shards.offset[row])
            after = self._data[image + int(self._shards.length[row]) : self._record_end(row)]
            first = "the text" if self._shards.is_text else "the image"
            parts: dict[str, ShardSet | MemberColumns] = {first: self._shards, **self._shards.members}
            for name, place in parts.items():
                if zlib.crc32(self._part(row, place)) != int(place.crc[row]):
                    self._report(row, int(place.offset[row]), f"{name}'s bytes have changed")
            if frame_crc(self._data[start:image], after) != int(self._shards.frame_crc[row]):
                self._report(row, start, "a header, the label, the metadata or padding has changed")

    def _check_structure(self) -> None:
        """Compares the samples that a tar reader finds with the index."""
        row = self._rows.start
        try:
            for sample in scan_samples(self._data):
                if row == self._rows.stop:
                    self._report(None, sample.start, f"sample {sample.key!r} is not in the index")
                    return
                self._check_sample(row, sample)
                row += 1
        except TarError as error:
            # A sample with a broken header was reported by its checksum, unless the shard was wrong from the start.
            if not self.findings:
                self._report(row if row < self._rows.stop else None, error.offset, error.reason)
            return
        if row < self._rows.stop and not self.findings:
            self._report(row, int(self._shards.record_offset[row]), "the tar holds fewer samples than the index")

    def _check_sample(self, row: int, sample: TarSample) -> None:
        shards = self._shards
        if sample.key != shards.key(row) or sample.start != shards.record_offset[row]:
            self._report(row, int(shards.record_offset[row]), f"the tar has {sample.key!r} at {sample.start} instead")
            return
        if not any(member.offset == shards.offset[row] for member in sample.members.values()):
            self._report(row, int(shards.offset[row]), "no member of the sample begins where the index says")
        for name, place in shards.members.items():
            found = sample.members.get(name)
            if found is None or (found.offset, found.size) != (place.offset[row], place.length[row]):
                self._report(row, int(place.offset[row]), f"{name}: not where the index says")
                return
        label = sample.members.get("cls")
        if label is None:
            self._report(row, sample.start, "has no label (.cls)")
            return
        text = bytes(self._data[label.offset : label.offset + label.size])
        if text.strip() != str(int(shards.label[row])).encode():
            self._report(row, label.offset, f"label {text[:20]!r}, the index says {int(shards.label[row])}")

    def _check_images(self) -> None:
        # Here, not above: torch takes more than a second to import, which --no-decode saves.
        from data_pipelines.image.decode import decode_rgb
        from data_pipelines.image.map_png import decode_maps
        from data_pipelines.image.pillow_door import BadImageError

        for row in self._rows:
            if row in self.bad_rows:
                continue
            offset = int(self._shards.offset[row])
            if self._shards.is_text:
                sizes = int(self._shards.length[row]), int(self._shards.width[row]), int(self._shards.height[row])
                if self._shards.is_pairs:
                    is_right = sizes[2] == int(self._shards.members[TARGET].length[row])
                else:
                    is_right = 0 < sizes[2] <= sizes[1]
                if sizes[0] != sizes[1] or not is_right:
                    self._report(row, offset, f"is {sizes[0]} bytes, the index says {sizes[1]}, and {sizes[2]} count")
                continue
            try:
                height, width = decode_rgb(bytes(self._part(row, self._shards))).shape[1:]
                parts = {name: bytes(self._part(row, place)) for name, place in self._shards.members.items()}
                decode_maps(parts, parts.__getitem__, height, width, self._shards.num_classes)
            except BadImageError as error:
                self._report(row, offset, f"does not decode: {error}")
                continue
            expected = (int(self._shards.width[row]), int(self._shards.height[row]))
            if (width, height) != expected:
                self._report(row, offset, f"is {width} x {height} pixels, the index says {expected[0]} x {expected[1]}")


def _changed_tokens(shards: ShardSet) -> list[Finding]:
    known, file = shards.manifest.writer.get(TOKENS_HASH), shards.folder / TOKENS_NAME
    if known is None:
        return []
    found = "no such file"
    if file.is_file():
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    reason = f"expected a file of SHA-256 {known}, found {found}"
    return [] if found == known else [Finding(shard=TOKENS_NAME, key="", offset=0, reason=reason)]


def _duplicate_keys(shards: ShardSet) -> Iterator[Finding]:
    """Keys that occur twice in the set: readers that go by keys would lose one."""
    first: dict[str, int] = {}
    for row, key in enumerate(shards.keys):
        if key in first:
            other = shards.shard_names[int(shards.shard_of[first[key]])]
            shard = shards.shard_names[int(shards.shard_of[row])]
            reason = f"duplicate key, also in {other} at offset {int(shards.record_offset[first[key]])}"
            yield Finding(shard=shard, key=key, offset=int(shards.record_offset[row]), reason=reason)
        first.setdefault(key, row)
