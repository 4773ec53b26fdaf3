"""Named methods: what is quantized, how it is calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel

_TIMESTEP_ONLY = ("timesteps", "k", "boundaries", "timestep_arg", "train_timesteps")


@dataclass(frozen=True)
class Preset:
    """One method: `model` its arguments for the model class, `calibrator` those for the `Calibrator`."""

    description: str
    timestep_aware: bool = False
    activations: bool = True
    model: Mapping[str, object] = field(default_factory=dict)
    calibrator: Mapping[str, str] = field(default_factory=dict)


_MAX = {"act_scale_policy": "max", "act_update_policy": "maximum"}
_MSE = {"act_scale_policy": "mse", "act_update_policy": "maximum"}
_FILTERED = {"quant_filters": "published"}
_OPTIMAL = {"boundaries": "optimal"}

PRESETS: dict[str, Preset] = {
    "weights_only": Preset("weights only", activations=False),
    "max": Preset("weights and activations, largest magnitude", calibrator=_MAX),
    "max_filtered": Preset("max, published layers left out", model=_FILTERED, calibrator=_MAX),
    "mse": Preset("weights and activations, least error", calibrator=_MSE),
    "mse_filtered": Preset("mse, published layers left out", model=_FILTERED, calibrator=_MSE),
    "timestep_mse": Preset("mse in each of k timestep intervals", True, calibrator=_MSE),
    "timestep_mse_filtered": Preset(
        "timestep_mse, published layers left out", True, model=_FILTERED, calibrator=_MSE
    ),
    "timestep_optimal": Preset("timestep_mse, intervals chosen", True, model=_OPTIMAL, calibrator=_MSE),
    "timestep_split": Preset(
        "timestep_optimal, halves of skip concatenations apart",
        True,
        model={**_OPTIMAL, "split_shortcuts": True},
        calibrator=_MSE,
    ),
}
"""The methods that the quantization study compares. Their weights are scaled by the largest magnitude."""


def build(
    preset: str | Preset, module: nn.Module, weight_bits: int = 8, act_bits: int = 8, **overrides: object
) -> QuantModel:
    """The uncalibrated model of a preset, by name or itself.

    `overrides` are arguments of the model class that take the place of the preset's. Those of timestep
    intervals (`timesteps`, `k`, `boundaries`, ...) are for the timestep-aware presets, the others pass
    over them, so that one call serves all. Calibrate it with `Calibrator(sd, q, **preset.calibrator)`.

    Raises ValueError for a name that is none of `PRESETS`.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"method must be one of {', '.join(PRESETS)}, not {preset!r}")
        preset = PRESETS[preset]
    params = {
        "weight_quant_params": {"n_bits": weight_bits},
        "act_quant_params": {"n_bits": act_bits} if preset.activations else None,
        **preset.model,
        **overrides,
    }
    if preset.timestep_aware:
        return TimeStepCalibratedQuantModel(module, **params)
    return QuantModel(module, **{name: v for name, v in params.items() if name not in _TIMESTEP_ONLY})
