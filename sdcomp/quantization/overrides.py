"""Other quantizers for the layers that match a name, such as 8 bits at both ends of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from sdcomp.quantization.filters import matches

SIDES = ("weight_quant_params", "act_quant_params")
Overrides = dict[str, dict[str, dict[str, object] | None]]
"""By filter and side: the settings that change; None leaves the side in full precision."""


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
