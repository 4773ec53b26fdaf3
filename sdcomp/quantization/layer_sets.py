"""Sets of layers that have a name: those that stay in full precision, and those that get other bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sdcomp.quantization.layer_patterns import matches

SIDES = ("weight_quant_params", "act_quant_params")
Overrides = dict[str, dict[str, dict[str, object] | None]]
"""By filter and side: the settings that change; None leaves the side in full precision."""


def published_filters(module: nn.Module) -> list[str]:
    """Return filters for the layers that published work leaves out.

    These are the time embedding, the first two blocks, the bottleneck, the last block and the output layer.
    For our UNet and diffusers' `UNet2DConditionModel`, of any depth. Raises ValueError for other modules.
    """
    if hasattr(module, "output_blocks"):
        last = len(module.output_blocks) - 1
        return [
            "time_embed",
            "input_blocks.0",
            "input_blocks.1",
            "middle_block",
            f"output_blocks.{last}",
            "out",
        ]
    if hasattr(module, "up_blocks"):
        block, layer = len(module.up_blocks) - 1, len(module.up_blocks[-1].resnets) - 1
        ends = [
            ("down_blocks.0", 0, module.down_blocks[0]),
            (f"up_blocks.{block}", layer, module.up_blocks[-1]),
        ]
        return ["time_embedding", "conv_in", "mid_block", "conv_out"] + [
            f"{name}.{kind}.{i}"
            for name, i, part in ends
            for kind in ("resnets", "attentions")
            if hasattr(part, kind)
        ]
    raise ValueError(
        f"the published filters are for UNets; name the layers of {type(module).__name__} yourself"
    )


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


FILTERS: dict[str, Callable[[nn.Module], list[str]]] = {"published": published_filters}
"""Sets of filters by name, worked out for a module."""

OVERRIDES: dict[str, Callable[[nn.Module], Overrides]] = {"ends_at_8_bits": ends_at_8_bits}
"""Sets of overrides by name, worked out for a module."""


def as_filters(filters: Sequence[str] | str, module: nn.Module) -> list[str]:
    """Return filters as a list. Raises ValueError for an unknown name, TypeError for other types."""
    if isinstance(filters, str):
        if filters not in FILTERS:
            raise ValueError(
                f"quant_filters must be a list of names such as [{filters!r}], or {', '.join(FILTERS)}"
            )
        return FILTERS[filters](module)
    filters = list(filters)
    if not all(isinstance(pattern, str) for pattern in filters):
        raise TypeError("quant_filters must be a list of texts")
    return filters


def as_table(overrides: Mapping[str, Mapping[str, object]] | str, module: nn.Module) -> Overrides:
    """Return overrides as a table. Raises ValueError for an unknown name or side."""
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
