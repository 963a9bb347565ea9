"""Files that are complete or not there: written under another name, flushed to the disk, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Large, so that the small parts of a record do not cost a system call each.
_BUFFER_BYTES = 1 << 20


@contextmanager
def replacing(path: Path, work_folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends, and vanishes when it fails.

    `work_folder` (default: that of `path`) holds it until then and must be on the same file system.
    """
    temporary = (work_folder or path.parent) / f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb", buffering=_BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # Failures of write and fsync do not name the file.
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
