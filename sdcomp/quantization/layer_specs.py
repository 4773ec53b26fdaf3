"""Which quantizer each layer gets: a model's own for all, and others for the layers that overrides match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization.layer_patterns import matches
from sdcomp.quantization.layer_sets import Overrides
from sdcomp.quantization.overrides import as_table
from sdcomp.quantization.quantizer import UniformQuantizer


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    A side without a quantizer stays in full precision. `intervals`: how many timestep intervals have their
    own input grid. `split`: the input channels of the first half of a skip concatenation whose halves have
    their own grids, else None.
    """

    weight_quantizer: UniformQuantizer | None
    act_quantizer: UniformQuantizer | None
    intervals: int = 1
    split: int | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the input's grid comes from a calibration; that of each token is found at each call."""
        return self.act_quantizer is not None and self.act_quantizer.granularity != "token"


def quantizer_of(params: Mapping[str, object] | None, *, weights: bool) -> UniformQuantizer | None:
    """Make the quantizer of weights or activations from its arguments; None for None.

    Raises ValueError for a granularity that the side cannot have, and what `UniformQuantizer` raises.
    """
    if params is None:
        return None
    params = dict(params)
    channel_wise = params.pop("channel_wise", weights)
    if not isinstance(channel_wise, bool):
        raise TypeError(f"channel_wise must be True or False, not {channel_wise!r}")
    default = "channel" if weights and channel_wise else "tensor"
    quantizer = UniformQuantizer(**{"granularity": default, **params})
    allowed = ("tensor", "channel", "group") if weights else ("tensor", "token")
    if quantizer.granularity not in allowed:
        side = "weights" if weights else "activations"
        raise ValueError(
            f"the granularity of {side} must be one of {', '.join(allowed)}, not {quantizer.granularity!r}"
        )
    return quantizer


def parameters_of(quantizer: UniformQuantizer | None) -> dict[str, object] | None:
    """Return the arguments of a quantizer, ready for JSON."""
    return None if quantizer is None else asdict(quantizer)


def layer_specs(
    module: nn.Module,
    names: Sequence[str],
    weight_quantizer: UniformQuantizer | None,
    act_quantizer: UniformQuantizer | None,
    overrides: Mapping[str, Mapping[str, object]] | str,
    intervals: int,
    splits: Mapping[str, int],
) -> tuple[Overrides, dict[str, LayerSpec]]:
    """Return the overrides as a table, and how each of the named layers is quantized.

    Raises UserError for an override that matches no layer, ValueError for an unknown name or side, and for
    groups of columns in a layer with a split.
    """
    overrides = as_table(overrides, module)
    for pattern in overrides:
        if not any(matches(pattern, name) for name in names):
            raise UserError(f"override {pattern!r} matches no quantized layer")
    specs = {}
    for name in names:
        params = {"weight_quant_params": parameters_of(weight_quantizer)}
        params["act_quant_params"] = parameters_of(act_quantizer)
        for pattern, sides in overrides.items():
            if matches(pattern, name):
                for side, changes in sides.items():
                    # A side that the model leaves in full precision stays so.
                    if params[side] is not None:
                        params[side] = None if changes is None else {**params[side], **changes}
        weight = quantizer_of(params["weight_quant_params"], weights=True)
        act = quantizer_of(params["act_quant_params"], weights=False)
        split = splits.get(name)
        if split is not None and weight is not None and weight.granularity == "group":
            raise ValueError("split_shortcuts and groups of columns cannot go together: choose one")
        specs[name] = LayerSpec(weight, act, intervals, split)
    return overrides, specs
