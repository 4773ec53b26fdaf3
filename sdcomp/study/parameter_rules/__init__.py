"""The values that each notebook's parameters may have: one module for each study."""

from sdcomp.study.parameter_rules import (
    base_model,
    claims,
    combined,
    conditions,
    low_bits,
    profiling,
    pruning,
    quantization,
)
from sdcomp.study.parameter_rules.common import Study

STUDIES: dict[str, Study] = {
    "00_base_model": base_model.STUDY,
    "01_quantization": quantization.STUDY,
    "02_pruning": pruning.STUDY,
    "03_profiling": profiling.STUDY,
    "04_combined": combined.STUDY,
    "05_claims": claims.STUDY,
    "06_low_bits": low_bits.STUDY,
    "07_conditions": conditions.STUDY,
}
"""The rules of each study, by the name of its notebook."""
