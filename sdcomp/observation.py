"""What layers see while a model runs: the second moments of their inputs.

Second-order methods (OBS: Hassibi & Stork 1993; GPTQ: Frantar et al. 2023; SparseGPT: Frantar & Alistarh
2023) need H = mean of x x^T over the rows x that a weight matrix multiplies. A convolution is the product of
its weight, as a matrix `(out, in * kh * kw)`, with the patches of its input (im2col), so it has one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.errors import UserError


class LastInput:
    """Remembers one value that was computed from the last input.

    Queries, keys and values read the same tensor, one after the other. `get` returns None unless the tensor
    is the same object, was not changed since, and `key` is the same too.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, object, object] | None = None

    def get(self, x: Tensor, key: object = None) -> object | None:
        """Return the value kept for this tensor and key, or None."""
        if self._kept is None or x.is_inference():
            return None
        before, version, kept_key, value = self._kept
        return value if before is x and version == x._version and kept_key == key else None

    def keep(self, x: Tensor, key: object, value: object) -> None:
        """Keep a value. Inference tensors do not count their changes, so nothing is kept for them."""
        self._kept = None if x.is_inference() else (x, x._version, key, value)

    def clear(self) -> None:
        """Forget the last input."""
        self._kept = None


def weight_matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a convolution or linear layer as `(out, columns)`; shares its memory if it can."""
    return layer.weight.detach().flatten(1)


def input_columns(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the rows that the weight matrix multiplies, image by image: `(rows, columns)` float32.

    Raises UserError for grouped convolutions and for padding other than zeros.
    """
    if isinstance(layer, nn.Linear):
        yield from x.reshape(len(x) if x.dim() > 2 else 1, -1, x.shape[-1]).float()
        return
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UserError("second moments need convolutions with one group and zero padding")
    for image in x.split(1):
        patches = F.unfold(image.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        yield patches[0].T


@torch.no_grad()
def second_moments(
    module: nn.Module, layers: Sequence[str], run: Callable[[], object], *, rows: int = 8192, seed: int = 0
) -> dict[str, Tensor]:
    """Run a model once and return H = mean of x x^T for each named layer: `(columns, columns)` float32.

    `run` is any callable that calls `module`, for example a generation. A call contributes at most about
    `rows` rows of each layer's input, drawn at random. Layers that read the same tensor share one H, so
    do not change H in place. H takes 4 columns^2 bytes: 2.1 GB for the largest convolution of SD 1.5.

    Raises UserError for inputs that are not finite and for a layer that did not run, which it names.
    """
    moments: dict[str, _Moments] = {}
    last = LastInput()
    generator = torch.Generator().manual_seed(seed)

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            key = None if isinstance(layer, nn.Linear) else (layer.kernel_size, layer.stride, layer.padding)
            shared = last.get(x, key)
            if shared is None:
                last.keep(x, key, moments.setdefault(name, _Moments()).add(layer, x, rows, generator))
            else:
                moments[name] = shared

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in moments:
            raise UserError(f"layer {name} did not run, so its inputs have no second moments")
        if not moments[name].sum.diagonal().isfinite().all():
            raise UserError(f"the input of layer {name} has NaN or infinite values")
    return {name: moments[name].mean() for name in layers}


class _Moments:
    """A running sum of x x^T."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, layer: nn.Module, x: Tensor, rows: int, generator: torch.Generator) -> _Moments:
        """Add up to `rows` rows of one input; returns itself."""
        parts = list(input_columns(layer, x))
        for columns in parts:
            if len(columns) > (most := max(1, rows // len(parts))):
                columns = columns[torch.randperm(len(columns), generator=generator)[:most].to(x.device)]
            if self.sum is None:
                self.sum = columns.new_zeros(columns.shape[1], columns.shape[1])
            self.sum.addmm_(columns.T, columns)
            self.count += len(columns)
        return self

    def mean(self) -> Tensor:
        """The mean; the same tensor for all layers that share it."""
        if self.count:
            self.sum, self.count = self.sum / self.count, 0
        return self.sum
