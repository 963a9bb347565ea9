"""The one instrument for activation memory: a dispatch mode that sums the bytes of all live storages.

It sees what operators allocate, on any device and also under `FakeTensorMode`, where nothing is computed: prediction
and measurement read the same scale. It does not see scratch space inside a kernel, nor storages that existed before.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes allocated inside the context and still alive: `live` and its maximum `peak`.

    Gradients that arrive at `parameters` are not activations and are not counted from then on, nor are the copies of
    them that a first backward pass puts into `.grad` where they lie in another order than the weight. `launches`
    counts the operators that allocate, `moved` the bytes of their operands: what an eager run reads and writes.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.moved = self.launches = 0
        self._sizes: dict[int, int] = {}
        self._parameters = [p for p in parameters if p.requires_grad]
        self._hooks: list[Any] = []

    def __enter__(self) -> "LiveBytes":
        for p in self._parameters:
            self._hooks.append(p.register_hook(self.forget))  # type: ignore[no-untyped-call]
            self._hooks.append(p.register_post_accumulate_grad_hook(self._forget_grad))  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            self._watch(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if sum(self._watch(tensor, is_new=True) for tensor in outputs):
            self.launches += 1
            self.moved += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        self.peak = max(self.peak, self.live)
        return result

    def restart_peak(self) -> None:
        """Lets `peak` begin again at what is alive now."""
        self.peak = self.live

    def forget(self, tensor: Tensor) -> None:
        """No longer counts the storage of `tensor`."""
        key = tensor.untyped_storage()._cdata
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def _forget_grad(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.forget(parameter.grad)

    def _watch(self, tensor: Tensor, *, is_new: bool) -> bool:
        """Starts to follow the storage of `tensor`; False if it was followed already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes() if is_new else 0
        self.live += self._sizes[key]
        weakref.finalize(storage, partial(self._release, key)).atexit = False
        return True

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def measure_peak(parameters: Iterable[Tensor], step: Callable[[], object]) -> int:
    """The most activation bytes alive at once while `step()` runs; gradients of `parameters` are not counted."""
    with LiveBytes(parameters) as counter:
        step()
    return counter.peak
