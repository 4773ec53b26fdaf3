"""Pruned variants in words: what they stand for, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcomp.pruning import IMPORTANCES
from sdcomp.study import FP32, pruned
from sdcomp.study.requests import requested
from sdcomp.study.variants import patterned


@pytest.mark.parametrize(
    ("text", "variant", "label"),
    [
        ("unstructured 0.3", pruned("unstructured", 0.3), "unstructured 30 %"),
        ("unstructured 0.3 magnitude", pruned("unstructured", 0.3), "unstructured 30 %"),
        (
            "unstructured 0.6 global second_order",
            pruned("unstructured", 0.6, scope="global", importance="second_order"),
            "unstructured 60 % global by second_order",
        ),
        ("masked 0.05 l1", pruned("masked channels", 0.05, importance="l1"), "masked channels 5 % by l1"),
        ("2:4", patterned("2:4"), "2:4"),
        (
            "1:4 wanda recovered 400",
            patterned("1:4", importance="wanda", recover_steps=400),
            "1:4 by wanda, recovered 400",
        ),
        (
            "removed 0.45 recovered 400 second_order global",
            pruned("removed", 0.45, scope="global", importance="second_order", recover_steps=400),
            "removed 45 % global by second_order, recovered 400",
        ),
        ("removed 0.25 l2", pruned("removed", 0.25), "removed 25 %"),
        ("removed 0", FP32, "fp32"),
    ],
)
def test_words_stand_for_a_variant(text, variant, label):
    assert requested(text) == variant
    assert requested(text).label == label


@pytest.mark.parametrize(
    "text",
    [
        "", "0.3", "unstructured", "unstructured 1", "unstructured nan", "unstructured -0.1", "removed many",
        "pruned 0.3", "unstructured 0.3 l1", "2:4 l2", "masked 0.1 wanda", "masked 0.1 global",
        "removed 0.3 global", "removed 0.3 global wanda", "removed 0.3 recovered", "removed 0.3 recovered 0",
        "removed 0.3 recovered 1.5", "removed 0.3 wanda gradient", "unstructured 0.3 global global",
        "4:4", "0:4", "2:", ":4", "2:4:8", "-2:4", "2:4 0.5", "unstructured 0.3 second-order",
    ],
)  # fmt: skip
def test_other_words_are_refused_in_one_sentence(text):
    with pytest.raises(ValueError) as caught:
        requested(text)
    assert "\n" not in str(caught.value)


@given(
    st.sampled_from(["unstructured 0.5", "2:4", "removed 0.5"]),
    st.permutations([("global",), ("second_order",), ("recovered", "7")]),
)
def test_options_come_in_any_order(what, options):
    words = [word for option in options for word in option]
    variant = requested(" ".join([what, *words]))
    assert (variant.scope, variant.importance, variant.recover_steps) == ("global", "second_order", 7)
    assert variant.amount == 0.5


@given(st.text(st.sampled_from("removed unstructured :0.249lg*")))
def test_any_text_is_a_variant_or_refused(text):
    try:
        assert requested(text).importance in ("", "l1", *IMPORTANCES)
    except ValueError as error:
        assert str(error)
