"""Small tables of the host on their way to a device: the twin of `sret_scale.model.upload`, across a border."""

import torch
from torch import Tensor


def uploaded(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` of the host on a device.

    A plain copy to a GPU waits until all work that was launched so far is done. From pinned memory, which torch keeps
    until the copy is through, it is one more piece of that work.
    """
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
