"""Which weights matter: one choice of importance for single weights, patterns and whole units.

The data-dependent kinds estimate the error of losing a weight w_ij of a layer with inputs x and outputs y:

- "magnitude": |w_ij|. Needs no data.
- "wanda": |w_ij| times the norm of its input, w_ij^2 E[x_j^2] (Sun et al. 2024, equation 1). It compares
  weights of one layer.
- "gradient": this times E[g_i^2] for the gradient g of the module's output with respect to y. It is the
  diagonal of the Gauss-Newton matrix with Kronecker factors (Martens & Grosse 2015), and compares weights of
  all layers.
- "second_order": the error after the other weights of the row were corrected, from H = E[x x^T] (Optimal
  Brain Surgeon: Hassibi & Stork 1993). Pruning corrects them (SparseGPT: Frantar & Alistarh 2023). Rows and
  layers are compared by E[g_i^2] too, if the calibration has gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.kinds import require_kind
from sdcomp.moments import MEMORY, ROWS, MomentsOnDemand, input_columns, weight_matrix
from sdcomp.pruning.layers import prunable_layers

RIDGE = 0.05
"""The share of the squared mean that `Calibration.covariance` keeps."""
IMPORTANCES = ("magnitude", "wanda", "gradient", "second_order")


@dataclass(frozen=True)
class Calibration:
    """What data-dependent importance knows of each layer, by the layer's name.

    `moments`: H = E[x x^T] of its inputs, `(columns, columns)`. `means`: E[x], `(columns,)`; needed for
    removal. `gradients`: E[g^2] for each of its outputs, `(out,)`, where g is the gradient of the module's
    output; needed to compare layers.
    """

    moments: Mapping[str, Tensor]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, kind: str) -> Tensor:
        """The `kind` ("moments", "means" or "gradients") of a layer. Raises UserError if it is missing."""
        found = getattr(self, kind).get(name)
        if found is None:
            raise UserError(f"the calibration has no {kind} of layer {name}: gather them with calibrate()")
        return found

    def covariance(self, name: str) -> Tensor:
        """The covariance of a layer's inputs, `(columns, columns)`, plus `RIDGE` times the squared mean.

        In least squares this is a ridge on the change of the bias. It also keeps the matrix positive
        definite, as H and the mean come from different samples.
        """
        mean = self.of(name, "means")
        return torch.addr(self.of(name, "moments"), mean, mean, alpha=RIDGE - 1)


def calibrate(
    module: nn.Module,
    run: Callable[[], object],
    *,
    parts: Sequence[str] | None = None,
    gradients: bool = True,
    memory: float = MEMORY,
    rows: int = ROWS,
    seed: int = 0,
) -> Calibration:
    """Observe the layers below `parts` (default: the UNet's blocks) while `run` calls `module`.

    `run` is any callable, for example a generation; with `gradients` it runs twice. If the moments take more
    than `memory` bytes, it runs again while pruning goes on, once for each part that fits
    (`sdcomp.moments.MomentsOnDemand`); the result is the same. For `rows` see `MomentObserver`. Raises
    UserError for a layer that did not run and for inputs that are not finite, TypeError for another `run`.
    """
    require_kind(run, Callable, "give a callable that runs the module")
    names = list(prunable_layers(module, parts))
    moments = MomentsOnDemand(module, names, run, memory=memory, rows=rows, seed=seed)
    with _means(module, names) as means:
        if names:
            moments.gather(names[0])
    return Calibration(moments, means, output_gradients(module, names, run, seed=seed) if gradients else {})


@contextmanager
def _means(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Gather the mean input of each layer, `(columns,)`; complete when the context ends."""
    totals: dict[str, tuple[Tensor, int]] = {}
    means: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for columns in input_columns(layer, args[0]):
                total, count = totals.get(name, (0.0, 0))
                totals[name] = total + columns.sum(0), count + len(columns)

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
    means.update({name: total / count for name, (total, count) in totals.items()})


def output_gradients(
    module: nn.Module, layers: Sequence[str], run: Callable[[], object], *, seed: int = 0
) -> dict[str, Tensor]:
    """How much the module's output depends on each layer's output: E[g^2], `(out,)` for each layer.

    g = v^T J for random signs v and the Jacobian J of the module's output with respect to the layer's. The
    mean of g^2 is the diagonal of J^T J (Hutchinson 1990), so one backward pass for each call of `module` is
    enough. Squares are summed over images and positions, then averaged over the calls. Weights get no
    gradients.

    Raises UserError for a layer that did not run, or that the module's output does not depend on.
    """
    found: dict[str, Tensor] = {}
    calls = 0
    generator = torch.Generator().manual_seed(seed)

    def probe(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal calls
        if torch.is_inference_mode_enabled():
            raise UserError(
                "this needs gradients: run the module under torch.no_grad(), not inference_mode()"
            )
        calls += 1
        with torch.enable_grad():
            anchor = torch.zeros((), requires_grad=True)
            handles = [
                module.get_submodule(name).register_forward_hook(_summing(found, name, anchor))
                for name in layers
            ]
            try:
                output = module.forward(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            if output.requires_grad:
                torch.autograd.grad((output * signs).sum() / output.numel() ** 0.5, anchor)

    handle = module.register_forward_pre_hook(probe, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    for name in layers:
        if name not in found:
            raise UserError(f"the output does not depend on layer {name}, or it did not run")
    return {name: total / calls for name, total in found.items()}


def _summing(found: dict[str, Tensor], name: str, anchor: Tensor) -> Callable[..., Tensor]:
    """A forward hook that adds the squares of the gradient of a layer's output to `found[name]`."""

    def add(gradient: Tensor, axis: int) -> None:
        squares = gradient.float().square().movedim(axis, 0).flatten(1).sum(1)
        found[name] = found[name] + squares if name in found else squares

    def hook(layer: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        # The anchor alone is differentiated: outputs then have gradients, and weights get none.
        output = output + anchor.to(output)
        output.register_hook(partial(add, axis=-3 if isinstance(layer, nn.Conv2d) else -1))
        return output

    return hook


def check_importance(importance: str, calibration: object, checkpoint: object = None) -> None:
    """Raise ValueError for an unknown importance, and for data or a checkpoint that do not go with it."""
    if importance not in IMPORTANCES:
        raise ValueError(f"importance must be one of {', '.join(IMPORTANCES)}, not {importance!r}")
    if importance != "magnitude":
        require_data(calibration, f"importance {importance!r}")
    if importance != "second_order" and checkpoint is not None:
        raise ValueError(f"a checkpoint is kept for importance 'second_order' only, not for {importance!r}")


def require_data(calibration: object, purpose: str) -> None:
    """Raise ValueError for data that `gather` cannot use; `purpose` is what needs it."""
    if not isinstance(calibration, Calibration) and not callable(calibration):
        raise ValueError(
            f"{purpose} needs data: give calibration=, a Calibration or a callable that runs the module"
        )


def gather(
    module: nn.Module,
    calibration: Calibration | Callable[[], object] | None,
    parts: Sequence[str] | None,
    gradients: bool,
    inplace: bool = False,
) -> Calibration | None:
    """Return the calibration itself, or gather one while the callable runs the module.

    A module that is pruned in place cannot run as it was again: then all moments are held at once.
    """
    if calibration is None or isinstance(calibration, Calibration):
        return calibration
    memory = math.inf if inplace else MEMORY
    return calibrate(module, calibration, parts=parts, gradients=gradients, memory=memory)


@torch.no_grad()
def weight_scores(name: str, layer: nn.Module, importance: str, calibration: Calibration | None) -> Tensor:
    """The "magnitude", "wanda" or "gradient" of each weight of a layer, in the shape of its weight."""
    if importance == "magnitude":
        return layer.weight.detach().abs()
    scores = weight_matrix(layer).float().square() * calibration.of(name, "moments").diagonal()
    if importance == "gradient":
        scores *= calibration.of(name, "gradients")[:, None]
    return scores.view(layer.weight.shape)
