"""Results that the paired protocol does not record: errors along a path, and the accuracy of attributes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdcomp.evaluation import (
    PathErrors,
    Prompts,
    bootstrap,
    estimate,
    paired_difference,
)
from sdcomp.model import StableDiffusion
from sdcomp.scenes import prompt_accuracy
from sdcomp.study.run import Run
from sdcomp.study.variants import FP32, Variant


def record_path(run: Run, variant: Variant, errors: PathErrors, groups: Sequence[object]) -> None:
    """Record the means of a variant's `PathErrors`: candidates for the objective of a calibration."""
    for metric, values in (
        ("step error", errors.step.mean(0)),
        ("gain", 100 * errors.gain.mean(0)),
        ("final latent error", errors.final),
    ):
        unit = "%" if metric == "gain" else ""
        run.record(variant, metric, bootstrap(values, groups=groups), unit=unit, baseline=FP32)
        run.images.keep(variant, metric, values, groups, prompts="probes")


def record_attribute_accuracy(
    run: Run, variant: Variant, sd: StableDiffusion, images: Tensor, baseline: Tensor, prompts: Prompts
) -> None:
    """Record in how many images each attribute is right in all objects, beside the images of fp32.

    `images` and `baseline` are `(N, 3, H, W)`, of the first prompts. An image counts if its scene has the
    attribute. Without a reader nothing is recorded.
    """
    if sd.reader is None or prompts.scenes is None:
        return
    found, before = (
        prompt_accuracy(sd.reader, drawn, prompts.scenes[: len(drawn)]).by_attribute
        for drawn in (images, baseline)
    )
    for attribute, shares in found.items():
        places = [i for i, applies in enumerate((~shares.isnan()).tolist()) if applies]
        if not places:
            continue
        groups = [prompts.groups[i] for i in places]
        right, wanted = shares[places] == 1, before[attribute][places] == 1
        said = {"unit": "%", "attribute": attribute}
        run.record(variant, "attribute accuracy", estimate(right, groups), **said)
        run.images.keep(variant, "attribute accuracy", right, groups, places=places, attribute=attribute)
        if variant != FP32:
            change = paired_difference(right, wanted, groups)
            run.record(variant, "attribute accuracy difference", change, baseline=FP32, **said)
