"""Which quantizer each layer gets: a model's own for all, and others for the layers that overrides match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization.filters import matches
from sdcomp.quantization.quantizer import UniformQuantizer

SIDES = ("weight_quant_params", "act_quant_params")
Overrides = dict[str, dict[str, dict[str, object] | None]]


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
    overrides = _as_table(overrides, module)
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


def _as_table(overrides: Mapping[str, Mapping[str, object]] | str, module: nn.Module) -> Overrides:
    if isinstance(overrides, str):
        if overrides not in OVERRIDES:
            raise ValueError(
                f"overrides must be a table, or one of {', '.join(OVERRIDES)}, not {overrides!r}"
            )
        return OVERRIDES[overrides](module)
    table = {pattern: dict(sides) for pattern, sides in overrides.items()}
    for pattern, sides in table.items():
        if not sides.keys() <= set(SIDES):
            raise ValueError(f"override {pattern!r} may have {' and '.join(SIDES)} only, not {list(sides)}")
    return table


def ends_at_8_bits(module: nn.Module) -> Overrides:
    """Keep 8 bits where few bits hurt most and cost little.

    These are the first and the last layer, the embeddings of the time and of other conditions with their
    projections, and the keys and values of the text: 2.6 % of the multiply-accumulates of the tiny model's
    UNet. The names are ours, or those of diffusers' UNets and transformers. Raises ValueError for a module
    that has none of them.
    """
    ours = ("input_blocks.0", "out", "time_embed", "*.emb_layers", "*.attn2.to_k", "*.attn2.to_v")
    theirs = (
        "conv_in", "conv_out", "time_embedding", "add_embedding", "*.time_emb_proj",
        "pos_embed", "proj_out", "norm_out", "time_text_embed", "adaln_single", "context_embedder",
        "caption_projection", "*.attn2.to_k", "*.attn2.to_v",
    )  # fmt: skip
    patterns = ours if hasattr(module, "input_blocks") else theirs
    layers = module.named_modules()
    names = [name for name, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    known = [pattern for pattern in patterns if any(matches(pattern, name) for name in names)]
    if not known:
        raise ValueError(f"{type(module).__name__} has no layers that are known to be the ends of a UNet")
    return {pattern: {side: {"n_bits": 8} for side in SIDES} for pattern in known}


OVERRIDES: dict[str, Callable[[nn.Module], Overrides]] = {"ends_at_8_bits": ends_at_8_bits}
"""Sets of overrides by name, worked out for a module."""
