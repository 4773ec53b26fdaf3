"""What counts as gentle, and that such a variant must stay close to fp32."""

from dataclasses import replace

import pytest

from sdcomp.study import Variant, pruned, quantized
from sdcomp.study.checks import check_close, gentle

SPARSE = pruned("unstructured", 0.2)
GENTLE = [
    SPARSE,
    quantized("max", 6, 8),
    quantized("weights_only", 6),
    quantized("timestep_mse", 8, 8, 10, of=SPARSE, execution="int8"),
    quantized("weights_gptq", 4, execution="packed"),
    quantized("low_bits", 4, 8),
]
HARSH = [
    Variant(steps=6),
    replace(GENTLE[1], steps=10),
    pruned("unstructured", 0.5),
    pruned("removed", 0.1),
    quantized("max", 5, 8),
    quantized("max", 8, 6),
    quantized("low_bits", 4, 4),
    quantized("weights_gptq_groups", 3),
]


@pytest.mark.parametrize("variant", GENTLE)
def test_a_gentle_variant_must_be_close(variant):
    assert gentle(variant)
    row = {"variant": variant, "label": variant.label}
    check_close([row | {"value": 20.1}])
    for value in (19.9, float("nan")):
        with pytest.raises(AssertionError, match="not close to the images of fp32"):
            check_close([row | {"value": 35.0}, row | {"value": value}])


@pytest.mark.parametrize("variant", HARSH)
def test_a_harsh_variant_may_be_far(variant):
    assert not gentle(variant)
    check_close([{"variant": variant, "label": variant.label, "value": 5.0}])
