"""The parameters of 00_base_model."""

from dataclasses import replace

from sdcomp.study.parameter_rules.common import (
    COMMON,
    FOLDER,
    GENERATION,
    TRAINING_STEPS,
    Rule,
    Study,
    between,
)

STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        "save_to": FOLDER,
        "checkpoints": FOLDER,
        "train_images": Rule(
            lambda value: 256 <= value <= 10_000_000 and value % 4 == 0,
            "a multiple of 4 between 256 and 10,000,000",
        ),
        "vae_steps": TRAINING_STEPS,
        "clip_steps": TRAINING_STEPS,
        "unet_steps": TRAINING_STEPS,
        "reader_steps": TRAINING_STEPS,
        "n_images": between(1, 256),
        "guidance_sweep": replace(between(0, 100), unique=True),
    }
)
