"""What can be wrong with a machine before a run: each check answers with one line and, if it fails, what to do."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

import psutil

from data_pipelines.extras import install_packages
from data_pipelines.image.native import library as roi
from sret_scale.launch.nodes import visible_gpus

# What `setup.cfg` asks for, in the form (package, lowest, exact).
_NEEDED = (("torch", (2, 11), False), ("deepspeed", (0, 19, 8), True), ("webdataset", (1, 0, 2), False))
_FEW_BYTES = 20 * 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one check."""

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""

    def line(self) -> str:
        """One line for the terminal, a second one with the advice."""
        mark = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}[self.state]
        return f"{mark}  {self.name:<14} {self.text}" + (f"\n      {'':<14} -> {self.advice}" if self.advice else "")


def check_machine(folder: Path) -> Iterator[Finding]:
    """All checks of this machine; `folder` is where runs are written."""
    yield from check_versions(importlib.metadata.version)
    yield check_torchvision()
    yield check_apex(importlib.util.find_spec("apex"))
    yield check_devices()
    yield check_decoder(roi.is_in_use(), roi.is_stale())
    yield check_folder(folder)


def check_versions(version_of: Callable[[str], str]) -> Iterator[Finding]:
    """The packages whose versions decide; `version_of` is importlib.metadata.version."""
    yield Finding(name="python", state="ok", text=f"{sys.version.split()[0]} ({sys.executable})")
    for package, wanted, is_exact in _NEEDED:
        text = ".".join(map(str, wanted))
        advice = install_packages(f"{package}{'==' if is_exact else '>='}{text}")
        try:
            found = version_of(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name=package, state="fail", text=f"not installed, expected {text}", advice=advice)
            continue
        parts = tuple(int(part) for part in found.partition("+")[0].split(".")[: len(wanted)] if part.isdigit())
        if parts == wanted or (parts > wanted and not is_exact):
            yield Finding(name=package, state="ok", text=found)
        else:
            relation = "" if is_exact else " or later"
            yield Finding(name=package, state="fail", text=f"{found}, expected {text}{relation}", advice=advice)


def check_torchvision() -> Finding:
    """torchvision imports beside this build of torch."""
    try:
        importlib.import_module("data_pipelines.image.torchvision_door")
    except (ImportError, RuntimeError) as error:
        advice = f"install the torchvision that belongs to this torch: {install_packages('torchvision')}"
        return Finding(name="torchvision", state="fail", text=str(error).splitlines()[0], advice=advice)
    return Finding(name="torchvision", state="ok", text=importlib.metadata.version("torchvision"))


def check_apex(spec: ModuleSpec | None) -> Finding:
    """`apex`, if there is one, is NVIDIA's: PyPI's project of that name is another one. Nothing is imported."""
    if spec is None:
        return Finding(name="apex", state="ok", text="not installed (optional)")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() for folder in folders):
        advice = "pip uninstall apex: the project of that name on PyPI has nothing to do with NVIDIA's"
        return Finding(name="apex", state="fail", text="is not NVIDIA's apex", advice=advice)
    return Finding(name="apex", state="ok", text="NVIDIA's")


def check_devices() -> Finding:
    """GPUs that the driver shows are usable by this torch."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        text = f"{len(names)} x {', '.join(sorted(set(names)))}, CUDA {torch.version.cuda}, NCCL {nccl}"
        return Finding(name="devices", state="ok", text=text)
    if visible_gpus():
        text = f"nvidia-smi shows {len(visible_gpus())} GPUs, torch {torch.__version__} uses none"
        return Finding(name="devices", state="fail", text=text, advice="install a torch build for your driver's CUDA")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return Finding(name="devices", state="ok", text=f"no GPU; {cores} CPU cores, {memory:.0f} GiB of memory")


def check_decoder(is_in_use: bool, is_stale: bool) -> Finding:
    """The optional library that decodes JPEGs belongs to these sources: without it runs are right, but slower."""
    if is_in_use:
        return Finding(name="JPEG decoder", state="ok", text="compiled")
    text = "compiled from other sources, and not used" if is_stale else "not compiled; whole images are decoded"
    advice = "python -m data_pipelines.image.native.library builds it (needs a C compiler and libjpeg-turbo's headers)"
    return Finding(name="JPEG decoder", state="warn", text=text, advice=advice)


def check_folder(folder: Path) -> Finding:
    """The folder for runs can be written and has room for checkpoints."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder}: {free / 2**30:.0f} GiB free"
    if not os.access(existing, os.W_OK):
        advice = "choose another folder with --folder, or ask for the right to write"
        return Finding(name="disk", state="fail", text=f"{existing} is not writable", advice=advice)
    if free < _FEW_BYTES:
        advice = "make room: checkpoints, logs and shards need more than 20 GiB in long runs"
        return Finding(name="disk", state="warn", text=text, advice=advice)
    return Finding(name="disk", state="ok", text=text)
