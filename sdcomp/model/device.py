"""Check that PyTorch can compute on a device of this machine."""

from __future__ import annotations

import torch

from sdcomp.errors import UserError


def check_device(device: object) -> torch.device:
    """Return the device of a name such as "cpu", "cuda" or "cuda:1".

    Raises UserError for a device that this machine or this PyTorch does not have, and for anything that is
    not a device's name.
    """
    if not isinstance(device, str | torch.device):
        raise UserError(f"device must be a name such as 'cpu' or 'cuda', not {device!r}")
    try:
        found = torch.device(device)
        # The only test that works for all devices; it takes no memory.
        torch.empty(0, device=found)
    except Exception as error:  # each device raises its own kind of error
        lines = str(error).strip().splitlines()
        reason = lines[0][:200].rstrip(".") if lines else type(error).__name__
        raise UserError(
            f"device {str(device)!r} cannot be used here ({reason}); "
            "give 'cpu', or install the PyTorch that is built for this device"
        ) from None
    return found
