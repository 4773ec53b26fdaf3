"""Mixed precision against all choices there are."""

import itertools
import random

import pytest

from sdcomp.quantization import QuantModel, choose_bits, weight_overrides


def test_bits_are_near_those_of_an_exhaustive_search():
    ratios = []
    draw = random.Random(0)
    for _ in range(20):
        weights = {name: draw.choice([100, 200, 400]) for name in "abcde"}
        # Convex in the bits, as errors of rounding are: four times as much for each bit less.
        errors = {name: {b: draw.uniform(1, 9) * 4.0 ** (4 - b) for b in (8, 4, 3, 2)} for name in weights}
        average = draw.uniform(2.2, 7)
        chosen = choose_bits(errors, weights, average)
        spent = sum(chosen[name] * weights[name] for name in weights)
        assert spent <= average * sum(weights.values()) + 1e-6
        best = min(
            sum(errors[name][b] for name, b in zip(weights, bits, strict=True))
            for bits in itertools.product((8, 4, 3, 2), repeat=5)
            if sum(b * weights[name] for name, b in zip(weights, bits, strict=True))
            <= average * sum(weights.values())
        )
        ratios.append(sum(errors[name][chosen[name]] for name in weights) / best)
    assert min(ratios) >= 1 - 1e-9 and max(ratios) < 2 and sorted(ratios)[10] < 1.1


def test_a_budget_for_all_bits_takes_the_most():
    errors = {"a": {8: 0.1, 4: 1.0}, "b": {8: 0.1, 4: 0.5}}
    assert choose_bits(errors, {"a": 10, "b": 10}, 8) == {"a": 8, "b": 8}
    assert choose_bits(errors, {"a": 10, "b": 10}, 6) == {"a": 8, "b": 4}
    with pytest.raises(ValueError, match="all layers together can save"):
        choose_bits(errors, {"a": 10, "b": 10}, 3)


def test_overrides_name_the_layers():
    assert weight_overrides({"out.2": 3}) == {"out.2": {"weight_quant_params": {"n_bits": 3}}}


def test_the_layers_of_a_model_get_the_chosen_bits(small):
    q = QuantModel(small.unet, overrides=weight_overrides({"out.2": 3, "time_embed.0": 2}))
    bits = {layer.name: layer.weight_quantizer.n_bits for layer in q.quantized_layers()}
    assert (bits.pop("out.2"), bits.pop("time_embed.0")) == (3, 2) and set(bits.values()) == {8}
