"""A GPU that computes nothing, for machines without one: it tells what a step on CUDA tensors does to the host.

`start` runs a module in a process with `fake_gpu.cpp` preloaded. There, inside `WatchedGpu`, tensors on the CPU are
real ones, and those on `cuda` have no data (torch's fake tensors), but types, shapes and a device: an operator that
mixes the devices or draws from a generator of the other one fails, autocast casts, and the backward pass runs in a
thread of the device, all as on a GPU. Whatever would make the host wait for the GPU is written down.
"""

import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
COPIES = ("_to_copy", "copy_")


def build(folder: Path) -> Path:
    """The library with the device, compiled into a folder; needs g++."""
    library, torch_folder = folder / "fake_gpu.so", Path(torch.__file__).parent
    compiler = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([*compiler, str(source), "-o", str(library), *libraries], check=True)
    return library


def start(module: str, library: Path) -> "subprocess.CompletedProcess[str]":
    """`python -m module` on the fake GPU: torch looks for devices when it is imported, so it takes a process."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def pretend() -> None:
    """torch's Python layer says that there is a GPU; what needs its driver is left out."""
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device: torch.empty(0),
        "set_rng_state": lambda state, device: None,
        "synchronize": lambda device=None: None,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)


class WatchedGpu(TorchDispatchMode):
    """Inside, operators on `cuda` run without data. `waits` counts, by place in our code, what makes the host wait.

    `draws` counts what is drawn on the device from its global generator, which a captured graph or a resumed run would
    not repeat. An operator made for CPUs alone raises NotImplementedError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.draws: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "WatchedGpu":
        # Without it `torch.tensor(values, device="cuda")` would go around every mode.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(leaf, FakeTensor) for leaf in inputs) and not (device and device.type == "cuda"):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.waits[f"a number is read at {_place()}"] += 1
            return 0.0 if inputs[0].is_floating_point() else 0
        if name.startswith("mkldnn") or "for_cpu" in name:
            raise NotImplementedError(f"{name} is for CPUs, at {_place()}")
        self._note_wait(name, inputs, device, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._note_draw(name, kwargs.get("generator"))
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return args[0]
        args, kwargs = tree_map_only(Tensor, self._without_data, (args, kwargs))
        with self._fake:
            return func(*args, **kwargs)

    def _without_data(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _note_wait(self, name: str, inputs: list[Tensor], device: torch.device | None, args: Any, kwargs: Any) -> None:
        devices = {leaf.device.type for leaf in inputs} | ({device.type} if device else set())
        if name in COPIES:
            is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            hosts = [leaf for leaf in inputs if leaf.device.type == "cpu" and not isinstance(leaf, FakeTensor)]
            if len(devices) > 1 and not (is_asynchronous and hosts and hosts[0].is_pinned()):
                self.waits[f"a copy between host and device at {_place()}"] += 1
        elif len(devices) > 1 and any(leaf.device.type == "cpu" and leaf.ndim for leaf in inputs):
            self.waits[f"{name} of tensors of both at {_place()}"] += 1

    def _note_draw(self, name: str, generator: torch.Generator | None) -> None:
        if generator is None:
            self.draws[f"{name} at {_place()}"] += 1
        elif generator.device.type != "cuda":
            raise RuntimeError(f"{name} on the GPU draws from a generator of the {generator.device} at {_place()}")


def _place() -> str:
    """The innermost line of our own code."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file.parts[len(ROOT.parts)] in ("sret_scale", "data_pipelines", "benchmarks"):
            return f"{file.relative_to(ROOT)}: {frame.line}"
    return "no line of ours"
