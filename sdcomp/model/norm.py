"""Group normalization that treats every image of a batch alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose result for an image is the same bit for bit wherever it stands in the batch.

    For large channels-last maps PyTorch's CPU kernel gives each thread an equal share of all pixels, so an
    image that two threads share is summed in another order than one that a single thread has. Without
    gradients, such batches are therefore normalized one image at a time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return torch.cat([super(GroupNorm, self).forward(image) for image in x.split(1)])
