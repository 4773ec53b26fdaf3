"""The error that the quantization of each single layer adds: how sensitive the layers are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdcomp.evaluation.noise_errors import noise_mse, predictions
from sdcomp.model import StableDiffusion, Trace
from sdcomp.quantization import QuantLayer, QuantModel


def layer_errors(
    sd: StableDiffusion,
    model: QuantModel,
    prompts: list[str],
    trace: Trace,
    layers: Sequence[str] = (),
    **settings: object,
) -> dict[str, float]:
    """Return the mean of `noise_mse` with one layer quantized at a time, by the layer's name.

    `layers` are all quantized layers by default. The other arguments and errors are those of `predictions`.
    """
    errors = {}
    for name in layers or [layer.name for layer in model.quantized_layers()]:
        with model.only(name):
            errors[name] = noise_mse(sd, model, prompts, trace, **settings).mean().item()
    return errors


def output_errors(
    sd: StableDiffusion, model: QuantModel, prompts: list[str], trace: Trace, **settings: object
) -> dict[str, float]:
    """Return the squared error of each layer's output, relative to the output's square, by its name.

    Each layer sees the input that it has in the full-precision model, so a calibration of single layers can
    measure this error. The arguments and errors are those of `predictions`.
    """
    state = model.state
    switches = state.weights, state.activations
    errors: dict[str, list[float]] = {layer.name: [0.0, 0.0] for layer in model.quantized_layers()}

    def see(layer: QuantLayer, args: tuple[Tensor, ...], wanted: Tensor) -> None:
        state.weights, state.activations = switches
        found = layer.forward(*args)
        state.weights = state.activations = False
        errors[layer.name][0] += (found - wanted).square().sum().item()
        errors[layer.name][1] += wanted.square().sum().item()

    handles = [layer.register_forward_hook(see) for layer in model.quantized_layers()]
    state.weights = state.activations = False
    try:
        for _ in predictions(sd, model, prompts, trace, **settings):
            state.forget()
    finally:
        state.weights, state.activations = switches
        for handle in handles:
            handle.remove()
    return {name: error / whole for name, (error, whole) in errors.items() if whole > 0}
