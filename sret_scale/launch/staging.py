"""A copy of what ranks import on every node's own disk, so that a start of many ranks does not storm a shared one.

    launcher, once for an environment    installed packages + project -> one archive beside them
    agent, once for a node               that archive, read once -> SRET_SCALE_LOCAL/sret-UID/FINGERPRINT
    ranks                                import from there

A rank opens about 4,000 files of the environment at its start, nearly all of them small. Small files are copied; large
libraries stay where they are and are linked to: they are few, and a node's ranks share one copy in memory.
"""

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LOCAL = "SRET_SCALE_LOCAL"
"""Environment variable that names a folder on every node's own disk; without it ranks import what is installed."""
LARGEST_COPIED_BYTES = 1 << 20
KEPT_S = 3600.0
"""An archive that is no longer current is removed by the next one after so long."""
_PROJECT = ("sret_scale", "data_pipelines", "ds_configs")


def pack(prefix: Path, project: Path, folders: Sequence[Path]) -> Path:
    """The archive of the environment in `prefix`, made if there is none of its present content.

    project: holds the folders of this project; folders: the site-packages in use. Raises OSError when `prefix` cannot
    be written to.
    """
    archive = prefix / f"sret-scale-{fingerprint(project, folders)}.tar"
    if archive.exists():
        # In use again: another job may not remove it before the nodes of this one have read it.
        os.utime(archive)
        return archive
    entries = list(_entries(project, folders))
    partial = archive.with_suffix(f".{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w") as tar:
            for root, name in entries:
                for file in sorted(_files_below(root / name)):
                    _add(tar, file, file.relative_to(root))
        partial.replace(archive)
    except OSError as error:
        raise OSError(error.errno, f"{LOCAL}: {archive} cannot be written: {error.strerror}; unset {LOCAL}") from error
    finally:
        partial.unlink(missing_ok=True)
    for old in prefix.glob("sret-scale-*"):
        # A node of a job that is just starting may still have to read it.
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    return archive


def fingerprint(project: Path, folders: Sequence[Path]) -> str:
    """Changes with every installation and every file of the project, compiled ones aside.

    An installer writes a RECORD for each package that it puts in: its time stands for the package's files. Costs a list
    of each folder and a look at each RECORD.
    """
    digest = hashlib.sha256(f"{sys.version} {project}".encode())
    files = [file for name in _PROJECT for file in _files_below(project / name) if file.suffix != ".pyc"]
    for folder in folders:
        digest.update(f"{folder}: {_names(folder)}\n".encode())
        files += folder.glob("*.dist-info/RECORD")
    for file in sorted(files):
        found = file.stat()
        digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def unpack(archive: Path, local: Path) -> Path:
    """The folder to import from, on this node's own disk; the first process that comes unpacks, the others wait.

    Raises OSError when the folder belongs to somebody else, who could put code there, or the archive is damaged.
    """
    own = local / f"sret-{os.geteuid()}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{LOCAL}: {own} belongs to another user or can be written by others; remove it")
    target = own / archive.stem
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = own / f"{archive.stem}.partial"
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(partial, filter=_as_packed)
            except tarfile.TarError as error:
                raise OSError(f"{LOCAL}: {archive} is damaged ({error}); remove it") from error
            partial.rename(target)
    return target


def staged_environment(folder: Path, environment: Mapping[str, str], working_folder: str) -> dict[str, str]:
    """`environment` in which Python imports from `folder` first, and from the working folder last, as `-m` would."""
    before = environment.get("PYTHONPATH", "")
    path = [str(folder), *([before] if before else []), working_folder]
    # Python puts the working folder in front otherwise, and a start inside the project would import from there.
    # pydantic would look for plugins in the metadata of every installed package.
    own = {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
    return {**environment, **own}


def pack_installed() -> Path:
    """The archive of the Python that runs this, with this project."""
    folders = sorted({Path(entry) for entry in sys.path if entry.endswith("site-packages") and Path(entry).is_dir()})
    return pack(Path(sys.prefix), Path(__file__).resolve().parents[2], folders)


def _entries(project: Path, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """(folder, name in it) of everything that is packed."""
    wanted = _packages(project)
    for folder in folders:
        for name in _names(folder):
            first = name.partition("-")[0].lower() if name.endswith(".dist-info") else name.partition(".")[0]
            # NAME.libs holds the libraries of a wheel, whose name is not that of its package.
            if name.endswith(".libs") or (first in wanted and not name.endswith(".pth")):
                yield folder, name
    for name in _PROJECT:
        yield project, name


def _packages(project: Path) -> set[str]:
    """What ranks import of the installed packages, asked in a process of its own: it imports all of it."""
    command = [sys.executable, "-P", "-m", "sret_scale.launch.packages"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.splitlines() or [f"exit status {process.returncode}"]
        raise OSError(f"{LOCAL}: what ranks import cannot be listed: {lines[-1]}; fix that or unset {LOCAL}")
    return set(json.loads(process.stdout.splitlines()[-1]))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _files_below(path: Path) -> Iterator[Path]:
    """All files, and folders of C headers as a whole: a rank does not open what is in those."""
    if path.is_file():
        yield path
        return
    for entry in os.scandir(path):
        if entry.is_dir() and entry.name != "include":
            yield from _files_below(Path(entry.path))
        else:
            yield Path(entry.path)


def _add(tar: tarfile.TarFile, file: Path, name: Path) -> None:
    if file.is_dir() or file.stat().st_size > LARGEST_COPIED_BYTES:
        member = tarfile.TarInfo(str(name))
        member.type, member.linkname = tarfile.SYMTYPE, str(file.resolve())
        tar.addfile(member)
    else:
        tar.add(file.resolve(), str(name))


def _as_packed(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Files inside the folder alone; links lead out of it, to the libraries that were not copied."""
    return member if member.issym() else tarfile.data_filter(member, folder)
