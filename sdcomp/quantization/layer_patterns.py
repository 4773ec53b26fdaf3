"""Patterns that match the dotted names of layers, as filters and overrides use them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from sdcomp.errors import UserError


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


def left_out(filters: list[str], layers: list[str]) -> dict[str, str]:
    """The layers that filters leave out, each with the first filter that matches it.

    Raises UserError for a filter that matches no layer, and when no layer is left.
    """
    found = {name: pattern for pattern in reversed(filters) for name in layers if matches(pattern, name)}
    for pattern in filters:
        if not any(matches(pattern, name) for name in layers):
            raise UserError(
                f"filter {pattern!r} matches no layer; names begin with"
                f" {', '.join(sorted({name.split('.')[0] for name in layers})) or 'nothing'}"
            )
    if len(found) == len(layers):
        raise UserError("nothing to quantize: the filters leave out every convolution and linear layer")
    return found
