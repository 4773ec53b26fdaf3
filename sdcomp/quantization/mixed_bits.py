"""Mixed precision: which layer gets how many bits, under a budget."""

from __future__ import annotations

from collections.abc import Mapping

from sdcomp.budgets import Curve, allocate
from sdcomp.quantization.layer_sets import Overrides


def choose_bits(
    errors: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], average: float
) -> dict[str, int]:
    """Choose bits for each layer: at most `average` bits a weight over all, with a small summed error.

    `errors[layer][bits]` is what quantizing this layer alone costs, for example by
    `sdcomp.evaluation.layer_errors`; errors of different layers add up if they are independent. `weights` are
    the layers' numbers of weights. Solved by Lagrange multipliers, see `sdcomp.budgets.allocate`; HAWQ-V3
    (Yao et al. 2021) solves the same problem with second-order errors.

    Raises ValueError for an average below what the candidates allow.
    """
    candidates = {layer: sorted(table, reverse=True) for layer, table in errors.items()}
    curves = {
        layer: Curve(
            saved=[(bits[0] - b) * weights[layer] for b in bits], error=[errors[layer][b] for b in bits]
        )
        for layer, bits in candidates.items()
    }
    total = sum(weights[layer] for layer in errors)
    most = sum(bits[0] * weights[layer] for layer, bits in candidates.items())
    levels = allocate(curves, max(most - average * total, 0.0))
    return {layer: candidates[layer][level] for layer, level in levels.items()}


def weight_overrides(bits: Mapping[str, int]) -> Overrides:
    """Return the `overrides` of a `QuantModel` that give each layer's weights their bits."""
    return {layer: {"weight_quant_params": {"n_bits": n}} for layer, n in bits.items()}
