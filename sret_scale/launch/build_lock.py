"""Stale locks of torch's operator builds: a killed build leaves one, and every later run waits for it forever."""

import os
import time
from pathlib import Path

import psutil

# On a shared file system another machine may hold the lock; no operator here builds for longer than this.
_SHARED_BUILD_LIMIT_S = 1800.0
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "smb", "afs", "9p")


def extensions_folder() -> Path:
    """Where torch builds operators: TORCH_EXTENSIONS_DIR, or below the user's cache folder."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own) if own else Path(cache).expanduser() / "torch_extensions"


def clear_stale_locks(folder: Path | None = None) -> list[Path]:
    """Removes the build locks that no process holds and returns them.

    A lock is held while its file is open in a process of this machine. On a shared file system it also counts as held
    until it is older than any build.
    """
    folder = extensions_folder() if folder is None else folder
    locks = [path for depth in ("*/lock", "*/*/lock") for path in folder.glob(depth)]
    if not locks:
        return []
    opened = _open_files()
    removed = []
    for lock in locks:
        try:
            age_s = time.time() - lock.stat().st_mtime
            if lock.resolve() in opened or (_is_shared(lock) and age_s < _SHARED_BUILD_LIMIT_S):
                continue
            lock.unlink()
        except FileNotFoundError:
            # Its build ended between the look and the removal.
            continue
        removed.append(lock)
    return removed


def _open_files() -> set[Path]:
    """Every regular file that a process which we may look into holds open."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(descriptor.readlink())
        except OSError:
            # The process ended, or belongs to another user, who builds in another folder.
            continue
    return found


def _is_shared(path: Path) -> bool:
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind.startswith(_SHARED_FILE_SYSTEMS)
