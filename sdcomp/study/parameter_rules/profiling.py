"""The parameters of 03_profiling."""

from dataclasses import replace

from sdcomp.study.parameter_rules.common import (
    AMOUNT,
    CALIBRATION,
    COMMON,
    GENERATION,
    PROMPT_SET,
    Study,
    between,
    check_openvino,
    one_of,
)

STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        "amounts": replace(AMOUNT, unique=True),
        "backends": replace(one_of("fp32", "simulated", "int8", "openvino"), unique=True),
        "components": replace(one_of("text encoder", "UNet", "decoder"), unique=True),
        "n_calibration": CALIBRATION["n_calibration"],
        "calibration_prompts": PROMPT_SET,
        "calibration_steps": CALIBRATION["calibration_steps"],
        "prompts": PROMPT_SET,
        "repeats": between(1, 10_000),
    },
    check_openvino,
)
