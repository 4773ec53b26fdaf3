"""The second moments of layers' inputs, gathered while a model runs.

Second-order methods (OBS: Hassibi & Stork 1993; GPTQ: Frantar et al. 2023; SparseGPT: Frantar & Alistarh
2023) need H = mean of x x^T over the rows x that a weight matrix multiplies. A convolution is the product of
its weight, as a matrix `(out, in * kh * kw)`, with the patches of its input (im2col), so it has an H too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import dropwhile
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdcomp.errors import UserError

ROWS = 1024
"""Rows of a layer's input that each call of the model contributes, where a caller names no other number."""
MEMORY = 8 * 2**30
"""The bytes of second moments that are held at a time, where a caller names no other number."""
Layer = TypeVar("Layer", bound=nn.Module)


def weight_matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a convolution or linear layer as `(out, columns)`; shares its memory if it can."""
    return layer.weight.detach().flatten(1)


def input_columns(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the rows that the weight matrix multiplies, image by image: `(rows, columns)` float32."""
    if isinstance(layer, nn.Linear):
        yield from x.reshape(len(x) if x.dim() > 2 else 1, -1, x.shape[-1]).float()
        return
    for image in x.split(1):
        patches = F.unfold(image.float(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        yield patches[0].T


def can_observe(layer: nn.Module) -> bool:
    """Whether `MomentObserver` takes a layer: linear, or a convolution of one group with zero padding."""
    if isinstance(layer, nn.Linear):
        return True
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


class MomentObserver:
    """Gathers H = mean of x x^T of the named layers' inputs while it is entered as a context.

    A call contributes at most about `rows` rows of each layer's input, drawn at random. Equal runs give equal
    moments, whichever other layers are observed. H takes 4 columns^2 bytes: 2.1 GB for the largest
    convolution of SD 1.5.

    Raises UserError for a layer that `can_observe` does not take.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], *, rows: int = ROWS, seed: int = 0) -> None:
        self._layers = {name: module.get_submodule(name) for name in layers}
        for name, layer in self._layers.items():
            if not can_observe(layer):
                raise UserError(
                    f"layer {name} has no second moments: these need linear layers, or convolutions with one"
                    " group and zero padding"
                )
        self._rows, self._seed = rows, seed
        self._moments: dict[str, _Moments] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> MomentObserver:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _see(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._moments.setdefault(name, _Moments(self._seed)).add(layer, args[0], self._rows)

    def result(self) -> dict[str, Tensor]:
        """Return H of each layer, `(columns, columns)` float32, and let go of it.

        Raises UserError for a layer that did not run, and for inputs that are not finite.
        """
        for name in self._layers:
            if name not in self._moments:
                raise UserError(f"layer {name} did not run since the last result: it has no second moments")
            if not self._moments[name].sum.diagonal().isfinite().all():
                raise UserError(f"the input of layer {name} has NaN or infinite values")
        return {name: self._moments.pop(name).mean() for name in self._layers}


def second_moments(
    module: nn.Module, layers: Sequence[str], run: Callable[[], object], *, rows: int = ROWS, seed: int = 0
) -> dict[str, Tensor]:
    """Call `run()`, which calls `module`, once; return the layers' second moments, see `MomentObserver`."""
    with MomentObserver(module, layers, rows=rows, seed=seed) as observer:
        run()
    return observer.result()


def within_memory(layers: Sequence[Layer], memory: float) -> Iterator[list[Layer]]:
    """Yield layers in order, as many at a time as `memory` bytes hold the second moments of, at least one."""
    group: list[Layer] = []
    size = 0
    for layer in layers:
        own = 4 * weight_matrix(layer).shape[1] ** 2
        if group and size + own > memory:
            yield group
            group, size = [], 0
        group.append(layer)
        size += own
    if group:
        yield group


class MomentsOnDemand(Mapping[str, Tensor]):
    """The second moments of many layers by name; it holds at most `memory` bytes of them at a time.

    Asking for a layer that is not held calls `run` again and observes this layer and the next ones. So ask in
    order, and change neither `module` nor what `run` computes. `rows` and `seed`: see `MomentObserver`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        run: Callable[[], object],
        *,
        memory: float = MEMORY,
        rows: int = ROWS,
        seed: int = 0,
    ) -> None:
        self._module, self._names, self._run = module, list(layers), run
        self._memory, self._rows, self._seed = memory, rows, seed
        self._held: dict[str, Tensor] = {}

    def gather(self, first: str) -> None:
        """Call `run`, and hold the moments of the layer `first` and of the next ones that fit."""
        self._held = {}  # frees the memory first
        rest = list(dropwhile(lambda name: name != first, self._names))
        layers = [self._module.get_submodule(name) for name in rest]
        fit = rest[: len(next(within_memory(layers, self._memory)))]
        self._held = second_moments(self._module, fit, self._run, rows=self._rows, seed=self._seed)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._held:
            self.gather(name)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Moments:
    """A running sum of x x^T."""

    def __init__(self, seed: int) -> None:
        self.sum: Tensor | None = None
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, layer: nn.Module, x: Tensor, rows: int) -> None:
        """Add up to about `rows` rows of one input."""

        def draw(tensor: Tensor, count: int) -> Tensor:
            if len(tensor) <= count:
                return tensor
            return tensor[torch.randperm(len(tensor), generator=self._generator)[:count].to(x.device)]

        if isinstance(layer, nn.Conv2d):
            # Patches are costly to cut out, so few images give many rows each.
            x = draw(x, max(1, 4 * rows // x[0, 0].numel()))
        parts = list(input_columns(layer, x))
        for part in parts:
            columns = draw(part, max(1, rows // len(parts)))
            if self.sum is None:
                self.sum = columns.new_zeros(columns.shape[1], columns.shape[1])
            self.sum.addmm_(columns.T, columns)
            self.count += len(columns)

    def mean(self) -> Tensor:
        """The mean."""
        return self.sum / self.count
