"""What a node must be able to read for a run: the shard sets and the teacher."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from sret_scale.launch.doctor.checks import Finding


def check_shards(folders: Sequence[Path]) -> Iterator[Finding]:
    """The shard folders are complete: manifest, index, and every tar with its size."""
    from data_pipelines.shards.index import open_shards

    for folder in folders:
        try:
            shards = open_shards(folder, allow_remote=True)
        except (ValueError, OSError) as error:
            yield Finding(name="shards", state="fail", text=str(error), advice="sret-scale shards verify says more")
            continue
        text = f"{folder}: {shards.num_samples:,} samples in {shards.num_shards} shards, {shards.num_classes} classes"
        yield Finding(name="shards", state="ok", text=text)


def check_teacher(spec: str, class_names: Sequence[str]) -> Finding:
    """The teacher loads here, and answers two images with logits of these classes."""
    from sret_scale.distill import build_teacher
    from sret_scale.train.load_run import check_teacher_classes, load_teacher_run

    try:
        check_teacher_classes(spec, class_names)
        build_teacher(spec, num_classes=len(class_names), device="cpu", load_run=load_teacher_run)
    except (ValueError, OSError) as error:
        return Finding(name="teacher", state="fail", text=str(error), advice="see docs/distillation.md for its names")
    return Finding(name="teacher", state="ok", text=f"{spec} answers for {len(class_names)} classes")
