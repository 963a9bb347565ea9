"""What one application of a chain costs: bytes and work, read off by the instrument on real or fake tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sret_scale.memory.gradients import Exit, GradientSums, entered
from sret_scale.memory.planning.instrument import LiveBytes
from sret_scale.memory.recompute import Chained, call_link, detached


@dataclass(frozen=True, kw_only=True)
class ApplicationCost:
    """Bytes that an application needs, and the work of one forward run. A run holds its input boundary on top of them.

    forward_bytes: peak of an untaped run, its output included.
    taped_bytes: peak of a taped run, its output included.
    tape_bytes: what the tape holds afterwards; its input and its output are in it where the tape needs them.
    backward_bytes: peak while the gradient goes through the tape; tape and incoming gradient included, gradients of
        parameters not.
    """

    boundary_bytes: int
    output_bytes: int
    forward_bytes: int
    taped_bytes: int
    tape_bytes: int
    backward_bytes: int
    moved_bytes: int = 0
    launches: int = 0
    flops: int = 0


def measure_application(application: Chained, x: Tensor) -> ApplicationCost:
    """The cost of `application` on an input like `x`, in the autocast state of now."""
    ((application,), _) = detached([application])
    parameters = tuple(p for p in application.parameters() if p.requires_grad)
    sums = GradientSums(parameters)
    with LiveBytes(parameters) as counter:
        with torch.no_grad():
            output = application(x)
        forward_bytes, moved_bytes, launches = counter.peak, counter.moved, counter.launches
        output_bytes = size_bytes(output)
        del output
        for _ in range(2):  # the second time the sums of parameter gradients exist, as in a long chain
            start = counter.live
            counter.restart_peak()
            own, entry = entered(x.clone()) if x.is_floating_point() else (x.clone(), None)
            given = [own]
            del own
            with torch.enable_grad():
                output = call_link(application, given)
            taped_bytes = counter.peak - start - size_bytes(x)
            end, gradient = Exit(output), [torch.empty_like(output)]
            del output
            tape_bytes = counter.live - start - size_bytes(gradient[0])
            counter.restart_peak()
            sums.backward(end, gradient, entry, range(len(parameters)))
            backward_bytes = counter.peak - start
            del end, entry
    return ApplicationCost(
        boundary_bytes=size_bytes(x),
        output_bytes=output_bytes,
        forward_bytes=forward_bytes,
        taped_bytes=taped_bytes,
        tape_bytes=tape_bytes,
        backward_bytes=backward_bytes,
        moved_bytes=moved_bytes,
        launches=launches,
        flops=forward_flops(lambda: application(x)),
    )


def forward_flops(call: Callable[[], object]) -> int:
    """Operations of the products in a call, two for a multiply-add, on real or fake tensors."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED_HERE) as counter:
        call()
    return counter.get_total_flops()


def size_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return tensor.numel() * tensor.element_size()


def _flash_flops(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(query_shape[:-1]) * key_shape[-2] * (query_shape[-1] + value_shape[-1])


def _linear_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x_shape) * weight_shape[0]


# What CPUs compute attention and linear layers with (`model.matmul`); torch's counter leaves it out.
_COUNTED_HERE: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _COUNTED_HERE[torch.ops.mkldnn._linear_pointwise] = _linear_flops
