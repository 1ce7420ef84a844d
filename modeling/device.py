"""Tensors on their way from the host to a device."""

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to `device`, queued behind what is there already: the host waits for nothing. On a CPU, the tensor itself.

    Made of a list, a tensor must come through here: `torch.tensor(values, device="cuda")` copies from memory that may
    be swapped out, and waits for the device first.
    """
    if device.type == "cuda" and host.numel():
        # torch keeps the pinned block until it is copied.
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
