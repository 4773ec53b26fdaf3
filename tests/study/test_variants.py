"""Variants: names that tell them apart, and a way into a row and back."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcomp.pruning import IMPORTANCES
from sdcomp.quantization import PRESETS
from sdcomp.study import FP32, Variant, pruned, quantized
from sdcomp.study.variants import EXECUTIONS, PRUNINGS, patterned

BITS = st.sampled_from([2, 4, 8, 32])


@st.composite
def variants(draw) -> Variant:
    """Any variant that a study could have."""
    found = {}
    if pruning := draw(st.sampled_from(PRUNINGS)):
        found |= {"pruning": pruning, "amount": draw(st.integers(1, 999)) / 1000}
        found |= {"scope": draw(st.sampled_from(["layer", "global"]))}
        found |= {"importance": draw(st.sampled_from(["", "l1", "l2", *IMPORTANCES]))}
        if pruning == "pattern":
            found |= {"pattern": draw(st.sampled_from(["2:4", "1:4", "4:8"]))}
            found |= {"amount": patterned(found["pattern"]).amount}
        found |= {"block": draw(st.sampled_from(["", "middle_block", "input_blocks.1"]))}
    found["recover_steps"] = draw(st.sampled_from([0, 1, 400]))
    if draw(st.booleans()):
        found |= {"recipe": draw(st.sampled_from(list(PRESETS))), "weight_bits": draw(BITS)}
        found |= {"act_bits": draw(BITS), "k": draw(st.sampled_from([0, 1, 10]))}
        found |= {"execution": draw(st.sampled_from(EXECUTIONS[1:])), "calibrated_first": draw(st.booleans())}
    return Variant(**found, steps=draw(st.sampled_from([0, 1, 10])))


@given(variants(), variants())
def test_two_variants_have_the_same_label_only_if_they_are_the_same(one, other):
    assert (one.label == other.label) == (one == other)


@given(variants())
def test_the_parameters_are_what_differs_from_the_baseline(variant):
    assert Variant(**variant.parameters) == variant
    assert all(getattr(FP32, name) != value for name, value in variant.parameters.items())


@given(variants())
def test_without_quantization_only_the_pruning_is_left(variant):
    plain = variant.unquantized
    assert not plain.recipe and plain.execution == "fp32" and plain.act_bits == plain.weight_bits == 32
    same = ("pruning", "amount", "pattern", "scope", "importance", "block", "recover_steps")
    assert [getattr(plain, name) for name in same] == [getattr(variant, name) for name in same]
    assert set(plain.parameters) <= set(same)


REMOVED = pruned("removed", 0.25, recover_steps=400)


@pytest.mark.parametrize(
    ("variant", "method", "label", "line"),
    [
        (FP32, "fp32", "fp32", "fp32"),
        (pruned("unstructured", 0.475), "unstructured", "unstructured 47.5 %", "unstructured"),
        (
            pruned("masked channels", 0.05, importance="l1"),
            "masked channels",
            "masked channels 5 % by l1",
            "masked channels by l1",
        ),
        (
            quantized("weights_gptq", 4, of=patterned("2:4", importance="second_order"), execution="packed"),
            "2:4 + weights_gptq + packed",
            "2:4 by second_order, weights_gptq W4 packed",
            "2:4 by second_order, weights_gptq W4 packed",
        ),
        (REMOVED, "removed, recovered", "removed 25 %, recovered 400", "removed, recovered 400"),
        (quantized("max", 6, 8), "max", "max W6A8", "max W6A8"),
        (quantized("weights_only", 4), "weights_only", "weights_only W4", "weights_only W4"),
        (Variant(steps=10), "fp32, other steps", "fp32, 10 steps", "fp32, 10 steps"),
        (
            quantized("timestep_mse", 8, 8, 10, of=REMOVED, execution="int8"),
            "removed, recovered + timestep_mse + int8",
            "removed 25 %, recovered 400, timestep_mse k10 W8A8 int8",
            "removed, recovered 400, timestep_mse k10 W8A8 int8",
        ),
        (
            Variant(
                "unstructured", 0.2, recipe="mse", weight_bits=4, calibrated_first=True, execution="simulated"
            ),
            "unstructured + mse, calibrated first",
            "unstructured 20 %, mse W4 calibrated first",
            "unstructured, mse W4 calibrated first",
        ),
    ],
)
def test_a_variant_names_itself(variant, method, label, line):
    assert (variant.method, variant.label, variant.describe(amount=False)) == (method, label, line)


@pytest.mark.parametrize(
    "fields",
    [
        {"pruning": "removed"},
        {"amount": 0.3},
        {"pruning": "maskd", "amount": 0.3},
        {"pruning": "pattern", "amount": 0.5},
        {"pruning": "unstructured", "amount": 0.5, "pattern": "2:4"},
        {"recipe": "max"},
        {"execution": "int8"},
        {"recipe": "max", "execution": "int4"},
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(ValueError, match="contradict each other|is unknown") as caught:
        Variant(**fields)
    assert "\n" not in str(caught.value)


def test_an_amount_of_nothing_is_the_baseline():
    assert pruned("removed", 0, recover_steps=400, importance="l1") == FP32
    assert quantized("max", 8, 8, of=pruned("removed", 0.0)) == quantized("max", 8, 8)


def test_the_baseline_has_no_field_that_is_set():
    assert {field.name: getattr(FP32, field.name) for field in fields(FP32)} == {
        field.name: field.default for field in fields(Variant)
    }
