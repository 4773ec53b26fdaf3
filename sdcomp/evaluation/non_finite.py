"""Refuse scores, images and features that are not finite."""

from __future__ import annotations

from torch import Tensor

from sdcomp.errors import NonFiniteError


def require_finite(what: str, *values: Tensor) -> None:
    """Raise NonFiniteError if values are infinite or NaN; `what` names the values in the message."""
    for tensor in values:
        # `isfinite` makes a copy. Minimum and maximum need none, and they are NaN if any value is.
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(extreme.isfinite() for extreme in tensor.detach().aminmax()):
            bad = sum(int((~part.isfinite()).sum()) for part in tensor.reshape(-1).split(2**20))
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} {what} are not finite; record the variant as failed"
            )
