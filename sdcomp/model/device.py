"""Devices: whether this machine's PyTorch can compute on the one that is asked for."""

from __future__ import annotations

import torch

from sdcomp.errors import UserError


def check_device(device: object) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1".

    Raises UserError, in one sentence, for a device that this machine or its PyTorch does not have, and for
    what names none.
    """
    if not isinstance(device, str | torch.device):
        raise UserError(f"device must be a name such as 'cpu' or 'cuda', not {device!r}")
    try:
        found = torch.device(device)
        # The only test that holds for all devices; it takes no memory.
        torch.empty(0, device=found)
    except Exception as error:  # PyTorch raises another kind for each device
        lines = str(error).strip().splitlines()
        reason = lines[0][:200].rstrip(".") if lines else type(error).__name__
        raise UserError(
            f"device {str(device)!r} cannot be used here ({reason}); "
            "give 'cpu', or install the PyTorch that is built for this device"
        ) from None
    return found
