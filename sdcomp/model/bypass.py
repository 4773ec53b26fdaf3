"""What takes the place of a block that pruning removes."""

from __future__ import annotations

from torch import Tensor, nn


class Bypass(nn.Module):
    """What is left of a block without units: its shortcut, if it has one, and the last layer's bias.

    `forward(x, ...)`: feature maps `(B, C, h, w)` or tokens `(B, N, C)` -> the shortcut of x plus the bias;
    without a shortcut the bias, `(C,)`, which the caller adds to x. Other arguments are ignored.
    """

    def __init__(self, bias: nn.Parameter | None, shortcut: str | None, module: nn.Module | None) -> None:
        super().__init__()
        self.bias, self.shortcut = bias, shortcut
        if module is not None:
            self.add_module(shortcut, module)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        if self.shortcut is None:
            return x.new_zeros(()) if self.bias is None else self.bias
        if self.shortcut:
            x = getattr(self, self.shortcut)(x)
        if self.bias is None:
            return x
        return x + (self.bias[:, None, None] if x.dim() == 4 else self.bias)
