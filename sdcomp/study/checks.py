"""What must hold of the tiny model on every machine: a run that breaks it has a defect, not a finding."""

from __future__ import annotations

from collections.abc import Sequence

from sdcomp.quantization import PRESETS
from sdcomp.study.results import Row
from sdcomp.study.variants import Variant

CLOSE = 20.0
"""The PSNR in dB above which gentle compression leaves the images of fp32. Different images have about 10."""


def gentle(variant: Variant) -> bool:
    """Whether a compression is so little that its images must stay close to those of fp32.

    These are at most 30 % zeros, 8 bits for activations and 6 for weights, or 4 with second-order rounding.
    """
    preset = PRESETS.get(variant.recipe)
    fewest = 4 if preset and preset.methods else 6
    bits = variant.weight_bits >= fewest and variant.act_bits >= 8
    return bits and variant.pruning in ("", "unstructured") and variant.amount <= 0.3 and not variant.steps


def check_close(rows: Sequence[Row]) -> None:
    """Raise AssertionError where a `gentle` compression is not close to fp32; `rows` are those of PSNR."""
    far = [
        f"{row['label']}: {row['value']:.1f} dB"
        for row in rows
        if gentle(row["variant"]) and not row["value"] > CLOSE
    ]
    assert not far, f"not close to the images of fp32 (below {CLOSE:g} dB): {'; '.join(far)}"
