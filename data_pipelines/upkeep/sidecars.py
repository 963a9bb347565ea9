"""The small files by which other readers open the same shards.

wids.json          wids: shards with their number of samples and MD5
_info.json         timm's webdataset reader: the files of each split
sizes.json         open_clip: number of samples of each shard
shard-000000.idx   DALI's fn.readers.webdataset, as its wds2idx writes it: ending, offset, size and name of members
"""

import hashlib
import json
from pathlib import Path

from data_pipelines.atomic_files import write_whole
from data_pipelines.shards.index import open_shards
from data_pipelines.shards.tar_scan import mapped, scan_samples


def write_sidecars(folder: str | Path, *, split: str) -> list[Path]:
    """Writes the files for all four readers into the shard folder; `split` is the name that timm will know it by.

    ValueError where the tars lie elsewhere: a manifest says where to read, and never where to write.
    """
    shards = open_shards(folder)
    if "location" in shards.manifest.writer:
        raise ValueError(
            f"{folder}: its tars lie in {shards.manifest.writer['location']}, and other readers look for these files "
            "beside them: index the tars in their own folder (`sret-scale shards index` without an output)"
        )
    counts = {shard.file: shard.num_samples for shard in shards.manifest.shards}
    written = [_write_json(shards.folder / "sizes.json", counts)]
    info = {
        "name": split,
        "num_samples": shards.num_samples,
        "filenames": list(counts),
        "shard_lengths": list(counts.values()),
    }
    written.append(_write_json(shards.folder / "_info.json", {"name": shards.folder.name, "splits": {split: info}}))
    shardlist = []
    for name, num_samples in counts.items():
        with mapped(shards.folder / name) as data:
            digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
            written.append(_write(shards.folder / f"{Path(name).stem}.idx", _dali_index(data).encode()))
            shardlist.append({"url": name, "nsamples": num_samples, "filesize": len(data), "md5sum": digest})
    wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": shards.folder.name, "shardlist": shardlist}
    written.append(_write_json(shards.folder / "wids.json", wids))
    return written


def _dali_index(data: memoryview) -> str:
    """The index of one tar in the format v1.2 of wds2idx."""
    lines = []
    for sample in scan_samples(data):
        parts = (f"{ending} {part.offset} {part.size} {part.name}" for ending, part in sample.members.items())
        lines.append(" ".join(parts))
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def _write_json(path: Path, value: object) -> Path:
    return _write(path, json.dumps(value, indent=1).encode() + b"\n")


def _write(path: Path, data: bytes) -> Path:
    write_whole(path, data)
    return path
