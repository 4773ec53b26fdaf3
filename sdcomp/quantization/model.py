"""Models whose convolutions and linear layers simulate quantization, plain and timestep-aware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.model.kinds import require_module
from sdcomp.model.layers import is_quantized
from sdcomp.model.rebuild import normal_tensors, rebuild
from sdcomp.quantization.attention import quantized_products
from sdcomp.quantization.intervals import uniform_starts
from sdcomp.quantization.layer_patterns import left_out
from sdcomp.quantization.layer_sets import as_filters
from sdcomp.quantization.layer_specs import layer_specs, parameters_of, quantizer_of
from sdcomp.quantization.layers import QuantLayer, is_quantizable, quantize_layer
from sdcomp.quantization.model_base import QuantizedModel
from sdcomp.quantization.shared_state import QuantState
from sdcomp.quantization.shortcuts import shortcut_splits
from sdcomp.quantization.timestep_argument import TimestepArgument
from sdcomp.settings import whole_number

TIMESTEPS = 40
"""The steps of a calibration by default."""


class QuantModel(QuantizedModel):
    """A module with simulated n-bit weights and activations, called like the module itself.

    Every `nn.Conv2d` and `nn.Linear` that `quant_filters` does not leave out rounds its weight, per output
    channel, and its input, per tensor. `module` itself stays as it is; its weights are shared, not copied.
    For inference only: see `sdcomp.quantization.rounding_gradients` for gradients through the rounding.

    Memory: the rounded weights are kept from the first call on, as many bytes again as the quantized weights
    (3.4 GB for Stable Diffusion 1.5's UNet in float32). `clear_cache` frees them.

    `weight_quant_params`, `act_quant_params`: arguments of `UniformQuantizer`; None leaves that side in full
    precision. Weights have a scale for each "channel" by default; `channel_wise=False` is another word for
    one "tensor". Activations have one scale for the whole "tensor", or one for each "token" if asked. A
    `Calibrator` finds the scales of activations; its default policy is their `scale_method`.
    `quant_filters`: patterns, see `sdcomp.quantization.layer_patterns.matches`; or "published", see
    `published_filters`.
    `overrides`: filters, each with `weight_quant_params` and `act_quant_params` that change those of the
    layers it matches, for example `{"time_embed": {"act_quant_params": {"n_bits": 8}}}`; or the name of a set
    in `sdcomp.quantization.layer_sets.OVERRIDES`. Of several that match, the last one decides.
    `split_shortcuts=True` gives the two halves of a skip concatenation their own weight and activation
    scales in the layers that read it (Li et al. 2023, "Q-Diffusion", section 4.2).
    `quantize_attention_products=True` rounds queries, keys, values and probabilities in our attention too, to
    the bits of `act_quant_params`: see `QuantAttentionProduct`. This is simulated only. "scores" rounds only
    queries and keys, with one scale for each head: see `QuantAttentionScores`. It can be exported, and
    OpenVINO computes it in integers.

    Raises ValueError for a filter that matches no layer, when nothing is left to quantize, for
    `split_shortcuts` of a module whose skip concatenations are unknown, for `quantize_attention_products`
    without such products, without `act_quant_params` or of another value, for a module that is quantized
    already, and for weights that are not finite; TypeError for `split_shortcuts` that is not True or False,
    and for what is no module, such as a whole model.
    """

    train_timesteps = 1000

    def __init__(
        self,
        module: nn.Module,
        *,
        weight_quant_params: Mapping[str, object] | None = {"n_bits": 8},
        act_quant_params: Mapping[str, object] | None = {"n_bits": 8},
        quant_filters: Sequence[str] | str = (),
        overrides: Mapping[str, Mapping[str, object]] | str = {},
        split_shortcuts: bool = False,
        quantize_attention_products: bool | str = False,
        _starts: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        require_module(module)
        if is_quantized(module):
            raise UserError(
                f"this {type(module).__name__} is quantized already: quantize the model that it was made of"
            )
        if not isinstance(split_shortcuts, bool):
            raise TypeError(f"split_shortcuts must be True or False, not {split_shortcuts!r}")
        self.weight_quantizer = quantizer_of(weight_quant_params, weights=True)
        self.act_quantizer = quantizer_of(act_quant_params, weights=False)
        if self.weight_quantizer is None and self.act_quantizer is None:
            raise ValueError("weight_quant_params and act_quant_params are both None: nothing to quantize")
        self.quant_filters = as_filters(quant_filters, module)
        self.split_shortcuts = split_shortcuts
        self.quantize_attention_products = quantize_attention_products
        self.state = QuantState()

        layers = {name: layer for name, layer in module.named_modules() if is_quantizable(layer)}
        self.left_out = left_out(self.quant_filters, list(layers))
        splits = shortcut_splits(module) if split_shortcuts else {}
        for name in splits:
            if not isinstance(module.get_submodule(name), nn.Conv2d):
                raise UserError(f"layer {name} is no convolution: split_shortcuts splits only their inputs")
        self.overrides, specs = layer_specs(
            module, [name for name in layers if name not in self.left_out],
            self.weight_quantizer, self.act_quantizer, overrides, len(_starts), splits,
        )  # fmt: skip
        with normal_tensors():
            twins = {
                name: quantize_layer(layers[name], name, self.state, spec) for name, spec in specs.items()
            }
            asked = quantize_attention_products
            twins |= quantized_products(module, asked, self.act_quantizer, self.state)
            self.module = rebuild(module, twins)
            # Weights alone need no calibration.
            self.register_buffer(
                "is_calibrated", torch.tensor(not any(spec.calibrated for spec in specs.values()))
            )
            self.register_buffer("interval_starts", torch.tensor(_starts))
        self._starts = list(_starts)
        self.calibration: dict[str, object] = {}
        self.eval()

    @property
    def calibrated(self) -> bool:
        """Whether the activations have their scales; True where there is nothing to calibrate."""
        return bool(self.is_calibrated)

    @property
    def starts(self) -> list[int]:
        """The first training timestep of each interval."""
        return self._starts

    def set_starts(self, starts: Sequence[int]) -> None:
        """Move the intervals; their number stays. The scales must then be calibrated again."""
        self.interval_starts.copy_(torch.tensor(starts))
        self._starts = list(starts)

    def quantized_layers(self) -> list[QuantLayer]:
        """The layers that simulate quantization, in the module's order; each knows its `name`."""
        return [layer for layer in self.module.modules() if isinstance(layer, QuantLayer)]

    def set_use_quant(self, weights: bool = True, activations: bool = True) -> QuantModel:
        """Switch the quantization of weights and of activations on or off.

        With both off the plain module runs. Switching `weights` off frees the rounded weights. Returns the
        model.
        """
        self.state.weights, self.state.activations = bool(weights), bool(activations)
        if not weights:
            self.clear_cache()
        return self

    @contextmanager
    def only(self, layer: str) -> Iterator[None]:
        """Quantize one layer alone while this context is entered, to measure its share of the error.

        Raises ValueError for a name that no quantized layer has.
        """
        if layer not in {known.name for known in self.quantized_layers()}:
            raise ValueError(f"there is no quantized layer {layer!r}")
        self.state.only = layer
        try:
            yield
        finally:
            self.state.only = None

    def clear_cache(self) -> None:
        """Free the rounded weights; calls that need them make them again."""
        for layer in self.quantized_layers():
            layer.clear_cache()

    def forward(self, *args: object, **kwargs: object) -> object:
        state = self.state
        kwargs = self._enter(args, kwargs)
        active = state.weights or state.activations
        if not active and state.observer is None:
            return self.module(*args, **kwargs)
        # Only training differentiates through the rounding.
        with nullcontext() if state.operands is not None else torch.no_grad():
            try:
                return self.module(*args, **kwargs)
            finally:
                state.forget()

    def extra_repr(self) -> str:
        """Bits and switches. With the layers' own texts, models with other results have another text."""
        sides = (
            ("weights", self.weight_quantizer, self.state.weights),
            ("activations", self.act_quantizer, self.state.activations),
        )
        texts = [
            f"{side}: {f'{quantizer.n_bits} bits' if quantizer and on else 'full precision'}"
            for side, quantizer, on in sides
        ]
        return ", ".join(texts if self.state.only is None else [*texts, f"only {self.state.only}"])

    def arguments(self) -> dict[str, object]:
        """The constructor's arguments by name, without the module, ready for JSON."""
        return {
            "weight_quant_params": parameters_of(self.weight_quantizer),
            "act_quant_params": parameters_of(self.act_quantizer),
            "quant_filters": self.quant_filters,
            "overrides": self.overrides,
            "split_shortcuts": self.split_shortcuts,
            "quantize_attention_products": self.quantize_attention_products,
        }

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._starts = self.interval_starts.tolist()


class TimeStepCalibratedQuantModel(QuantModel):
    """A `QuantModel` with its own activation scales in each of `k` intervals of training timesteps.

    Activations of a diffusion model change along the sampling path (Shang et al. 2023, "PTQ4DM"). The
    interval is found from the timestep that each call brings, so a calibration holds for another sampler,
    number of steps or strength.

    `timesteps`: the number of calibration steps that is expected, at least `k`. `boundaries`: "uniform",
    or "optimal", where calibration places them. `timestep_arg`: where the module takes its timesteps, by
    position or name; by default the argument named `timestep` or `timesteps`, or else position 1. A name that
    the module's `forward` does not have, as for a block without timesteps, is a keyword argument that the
    model takes for itself. Calls give timesteps as a number or a tensor.

    Calls raise ValueError for timesteps out of 0 to `train_timesteps`, and for a batch whose timesteps lie in
    different intervals.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        timesteps: int = TIMESTEPS,
        k: int = 5,
        boundaries: str = "uniform",
        timestep_arg: int | str | None = None,
        train_timesteps: int = 1000,
        **params: object,
    ) -> None:
        for name, value in (("timesteps", timesteps), ("k", k), ("train_timesteps", train_timesteps)):
            if whole_number(name, value) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not k <= timesteps <= train_timesteps:
            raise ValueError(
                f"k={k} intervals need at least as many of the {train_timesteps} training timesteps to"
                f" calibrate at, not timesteps={timesteps}"
            )
        if boundaries not in ("uniform", "optimal"):
            raise ValueError(f"boundaries must be 'uniform' or 'optimal', not {boundaries!r}")
        require_module(module)
        argument = TimestepArgument.of(module, timestep_arg)
        super().__init__(module, **params, _starts=uniform_starts(k, train_timesteps))
        self.timesteps, self.k, self.boundaries = timesteps, k, boundaries
        self.timestep_arg, self.train_timesteps = argument.given, train_timesteps
        self._argument = argument

    def arguments(self) -> dict[str, object]:
        """The constructor's arguments by name, without the module, ready for JSON."""
        return {
            **super().arguments(),
            "timesteps": self.timesteps,
            "k": self.k,
            "boundaries": self.boundaries,
            "timestep_arg": self.timestep_arg,
            "train_timesteps": self.train_timesteps,
        }
