"""The command that installs a missing optional package into the environment at hand, for messages."""

import configparser
import importlib.metadata
import shlex
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def install_extra(extra: str) -> str:
    """The shell command that installs an extra of setup.cfg: set-up's in its own .venv, pip's elsewhere.

    Elsewhere the versions are the user's affair: pins of constraints.txt could replace a container's torch.
    """
    if _is_own_environment():
        return shlex.join([str(_ROOT / "launch.sh"), "setup", extra])
    try:
        importlib.metadata.distribution("sret-scale")
    except importlib.metadata.PackageNotFoundError:
        # A checkout that is used where it lies.
        config = configparser.ConfigParser(interpolation=None)
        config.read(_ROOT / "setup.cfg", encoding="utf-8")
        return install_packages(*config["options.extras_require"][extra].split())
    return install_packages(f"sret-scale[{extra}]")


def install_packages(*requirements: str) -> str:
    """The shell command that installs packages that are in no extra."""
    pins = ["-c", str(_ROOT / "constraints.txt")] if _is_own_environment() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *pins, *requirements])


def _is_own_environment() -> bool:
    return Path(sys.prefix).resolve() == (_ROOT / ".venv").resolve()
