"""Which quantizer each layer gets: a model's own for all, and others for the layers that overrides match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization.layer_patterns import matches
from sdcomp.quantization.layer_sets import SIDES, Overrides, as_table
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
    default = "channel" if weights else "tensor"
    quantizer = UniformQuantizer(**{"granularity": default, **_with_granularity(params, weights)})
    allowed = ("tensor", "channel", "group") if weights else ("tensor", "token")
    if quantizer.granularity not in allowed:
        side = "weights" if weights else "activations"
        raise ValueError(
            f"the granularity of {side} must be one of {', '.join(allowed)}, not {quantizer.granularity!r}"
        )
    return quantizer


def _with_granularity(params: Mapping[str, object], weights: bool) -> dict[str, object]:
    """The arguments of a quantizer, with the granularity in place of `channel_wise`.

    Activations have no scales by channel: there `channel_wise` says nothing, so that one dictionary serves
    weights and activations.
    """
    params = dict(params)
    if "channel_wise" not in params:
        return params
    channel_wise = params.pop("channel_wise")
    if not isinstance(channel_wise, bool):
        raise TypeError(f"channel_wise must be True or False, not {channel_wise!r}")
    if not weights:
        return params
    if "granularity" in params:
        raise ValueError("channel_wise and granularity say the same: give one of them; a preset may have one")
    return {**params, "granularity": "channel" if channel_wise else "tensor"}


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

    A set of overrides that has a name may match layers that filters leave out. Raises UserError for another
    override that matches no layer, ValueError for an unknown name or side, and for a layer with a split whose
    weight has groups of columns or whose input has a scale for each token.
    """
    table = as_table(overrides, module)
    idle = [pattern for pattern in table if not any(matches(pattern, name) for name in names)]
    if idle and not isinstance(overrides, str):
        raise UserError(f"override {idle[0]!r} matches no quantized layer")
    table = {pattern: sides for pattern, sides in table.items() if pattern not in idle}
    own = {
        "weight_quant_params": parameters_of(weight_quantizer),
        "act_quant_params": parameters_of(act_quantizer),
    }
    specs = {}
    for name in names:
        params = dict(own)
        for pattern, sides in table.items():
            if matches(pattern, name):
                for side, changes in sides.items():
                    # A side that the model leaves in full precision stays so.
                    if own[side] is None:
                        continue
                    if changes is not None:
                        changes = _with_granularity(changes, weights=side == SIDES[0])
                        changes = {**(params[side] or own[side]), **changes}
                    params[side] = changes
        weight = quantizer_of(params["weight_quant_params"], weights=True)
        act = quantizer_of(params["act_quant_params"], weights=False)
        split = splits.get(name)
        if split is not None and weight is not None and weight.granularity == "group":
            raise ValueError("split_shortcuts and groups of columns cannot go together: choose one")
        if split is not None and act is not None and act.granularity == "token":
            raise ValueError("split_shortcuts and a scale for each token cannot go together: choose one")
        specs[name] = LayerSpec(weight, act, intervals, split)
    return table, specs
