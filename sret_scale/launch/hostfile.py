"""Reads a hostfile of deepspeed's format (`NAME slots=N` a line) strictly: nothing in it can become an option or a
shell word, and a line that is not understood is an error instead of a host that is left out.

`NAME devices=2,5`, which deepspeed does not know, takes these GPUs of a host alone: one rank on each.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.checked_files import read_bounded

# Letters, digits, dots, hyphens, underscores; the first is a letter or digit, so that no name looks like an option.
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LINE = re.compile(r"(\S+)\s+(?:slots=([0-9]{1,4})|devices=([0-9]{1,4}(?:,[0-9]{1,4})*))")
MAX_HOSTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Host:
    """One node and its devices; on a CPU cluster a device is just a number."""

    name: str
    devices: tuple[str, ...]


def check_host_name(name: str, where: str) -> str:
    """`name`, or ValueError when it is not a plain host name or IPv4 address."""
    if not _HOST_NAME.fullmatch(name):
        raise ValueError(
            f"{where}: {name!r} is not a host name: expected letters, digits, dots, hyphens and underscores, "
            "beginning with a letter or digit (user names and ports belong in ~/.ssh/config)"
        )
    return name


def hosts_of(hostfile: Path | None) -> tuple[Host, ...]:
    """The hosts of a command's --hostfile; none where it was not given."""
    return () if hostfile is None else read_hostfile(hostfile)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in the order of the file; ValueError names the line and what was expected.

    Raises FileNotFoundError when there is no such file: deepspeed would go on with this machine alone.
    """
    if not path.exists():
        raise FileNotFoundError(f"hostfile {path} does not exist; expected a file with lines like: node-1 slots=8")
    hosts: list[Host] = []
    lines = read_bounded(path).decode("utf-8-sig", errors="replace").splitlines()
    for number, raw in enumerate(lines, start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        where = f"hostfile {path} line {number}"
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: expected 'NAME slots=N' or 'NAME devices=I,J,...', got {line!r}")
        name = check_host_name(match[1], where)
        devices = tuple(match[3].split(",")) if match[3] else tuple(str(index) for index in range(int(match[2])))
        if not devices:
            raise ValueError(f"{where}: {name} has 0 slots; remove the line or give it at least 1")
        if len(set(devices)) < len(devices):
            raise ValueError(f"{where}: {name} has a device twice: {match[3]}")
        if name.lower() in (host.name.lower() for host in hosts):
            raise ValueError(f"{where}: {name} is listed twice")
        hosts.append(Host(name=name, devices=devices))
    if not hosts:
        raise ValueError(f"hostfile {path} names no host; expected lines like: node-1 slots=8")
    if len(hosts) > MAX_HOSTS:
        raise ValueError(f"hostfile {path} names {len(hosts)} hosts, at most {MAX_HOSTS} are supported")
    return tuple(hosts)
