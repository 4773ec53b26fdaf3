"""Rounded weights that several variants share."""

from __future__ import annotations

from torch import Tensor

from sdcomp.quantization import QuantModel, Recipe
from sdcomp.study.variants import Variant

_BUFFERS = ("weight_scale", "weight_zero_point", "weight_integers", "branch_down", "branch_up")


def take_rounding(model: QuantModel, other: QuantModel) -> None:
    """Give a model the rounded weights of another one of the same UNet."""
    for layer, rounded in zip(model.quantized_layers(), other.quantized_layers(), strict=True):
        for name in _BUFFERS:
            layer.register_buffer(name, getattr(rounded, name))
        layer.clear_cache()


class KeptRounding:
    """Keeps the last weights that a recipe's methods rounded, for models that round them in the same way.

    The methods see the inputs of the full-precision model, so what they do to weights does not depend on how
    activations are quantized.
    """

    def __init__(self) -> None:
        self.reused = False
        self._key = ""
        self._layers: dict[str, dict[str, Tensor | None]] = {}
        self._methods: list[str] = []

    def take(self, model: QuantModel, of: Variant, recipe: Recipe) -> bool:
        """Give a model the kept weights if it would round the same; return whether it would.

        `of` is the variant without its quantization; it identifies the weights.
        """
        self.reused = bool(recipe.methods) and self._key == _key(model, of, recipe)
        if self.reused:
            for layer in model.quantized_layers():
                for name, tensor in self._layers[layer.name].items():
                    layer.register_buffer(name, tensor)
                layer.clear_cache()
        return self.reused

    def keep(self, model: QuantModel, of: Variant, recipe: Recipe) -> None:
        """Keep a calibrated model's weights in place of those before, if methods rounded them."""
        if self.reused:
            model.calibration["methods"] = self._methods
        elif recipe.methods:
            self._key = _key(model, of, recipe)
            self._methods = model.calibration["methods"]
            self._layers = {
                layer.name: {name: getattr(layer, name) for name in _BUFFERS}
                for layer in model.quantized_layers()
            }


def _key(model: QuantModel, of: Variant, recipe: Recipe) -> str:
    """Everything that rounded weights depend on, as text."""
    layers = [(layer.name, layer.split, layer.weight_quantizer) for layer in model.quantized_layers()]
    return f"{of} {recipe.methods} {layers}"
