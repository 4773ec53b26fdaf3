"""Which layers stay in full precision."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn


def matches(pattern: str, name: str) -> bool:
    """Whether a filter matches the dotted name of a layer, component by component.

    The filter's components must equal the first ones of the name: `out` matches `out.2`, and not
    `output_blocks.0`. Within a component `*` and `?` are wildcards: `input_blocks.*.0` matches
    `input_blocks.3.0.op`. After a leading `*` the rest may stand anywhere in the name: `*.to_v` matches
    every layer of that name at any depth, `*.attn2` everything below any `attn2`.
    """
    wanted, parts = pattern.split("."), name.split(".")
    starts = [0]
    if wanted[0] == "*":
        wanted = wanted[1:]
        starts = range(len(parts) - len(wanted) + 1)
    return any(
        len(parts) >= start + len(wanted)
        and all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in starts
    )


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


FILTERS: dict[str, Callable[[nn.Module], list[str]]] = {"published": published_filters}
"""Sets of filters by name, worked out for a module."""
