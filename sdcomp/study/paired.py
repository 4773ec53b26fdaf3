"""The paired protocol: every variant draws the same prompts from the same noise as the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sdcomp import scenes
from sdcomp.errors import NonFiniteError, UserError
from sdcomp.evaluation import (
    UNITS,
    Clip,
    Estimate,
    Prompts,
    branch_errors,
    cached_images,
    cached_trace,
    decibels,
    estimate,
    frechet_distance,
    kid_values,
    load_images,
    load_prompts,
    paired_difference,
    path_predictions,
    scores,
    squared_errors,
    ssim,
    step_weights,
)
from sdcomp.model.samplers import SAMPLER, STEPS
from sdcomp.study.plots import IMAGES_IN_A_ROW
from sdcomp.study.results import FAILED
from sdcomp.study.scores import SQUARED
from sdcomp.study.variants import FP32, Variant

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


HALVES = ("test", "final")
"""Two prompt sets that were drawn together, 256 prompts each. No choice is made on "final"."""
FEWEST = 32
"""With fewer images, distances between sets of images say nothing."""
FEWEST_SCENES = 3
"""Fewer scenes, or texts of prompts without scenes, have no Kernel Inception Distance."""


class Reference(NamedTuple):
    """Images `(N, 3, H, W)` in [0, 1] that distances are measured to, and their scenes, if known.

    Scenes are named as in `Prompts.groups`.
    """

    images: Tensor
    groups: list[str] | None = None


def reference_images(
    sd: StableDiffusion, prompts: Prompts, name: str, *, images: str = "", seed: int = 0
) -> Reference | None:
    """The images that distances between sets are measured to.

    These are the `images` of a file or folder where one is named. Otherwise, for prompts that have scenes,
    they are rendered scenes: those of both `HALVES` where `name` is one of them, else those of `prompts`. For
    other prompts there are none.
    """
    if images:
        return Reference(load_images(images, sd.config.image_size))
    if prompts.scenes is None:
        return None
    drawn = [load_prompts(sd, half, 256) for half in HALVES] if name in HALVES else [prompts]
    return Reference(
        scenes.render([scene for part in drawn for scene in part.scenes], seed),
        [group for part in drawn for group in part.groups],
    )


class PairedStudy:
    """Measures variants of a model's UNet beside the UNet itself, and records the results.

    Recorded for each variant: the scores of its images (`scores`); PSNR and SSIM to the baseline's images;
    from 32 images of 3 scenes on the Kernel Inception Distance (x 1000) and, with more images than features,
    the Frechet distance to `reference`; for the first `noise_images` prompts the squared errors of its noise
    predictions along the baseline's path: of the guided prediction and of both branches, as a mean over the
    steps, as a mean weighted by the square of `step_weights`, and step by step. Scores, KID and the means
    also as paired differences. `run.images` keeps them image by image.

    A variant with `steps` of its own starts from the same noise. Its noise predictions are those of the same
    UNet at the study's steps, so they are left out.

    A variant that gives infinite values or NaN has failed. Then its only row says so, with the reason.
    """

    def __init__(
        self,
        run: Run,
        sd: StableDiffusion,
        prompts: Prompts,
        *,
        reference: Reference | None = None,
        clip: Clip | None = None,
        noise_images: int = 0,
        shown: int = IMAGES_IN_A_ROW,
        about: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """`settings` are arguments of `generate`; `shown` images of each variant are kept, for figures.

        `about` says more about every result of this study, such as its sampler, where a run has several.

        Raises UserError where nothing can judge the images: `clip` is not given, and the model has neither
        an image encoder nor a reader for these prompts; and for a `reference` of fewer than 3 scenes.
        """
        self.run, self.sd, self.prompts, self.about = run, sd, prompts, about or {}
        self.settings, self.shown = {**settings, "progress": run.progress}, shown
        self.clip = clip or (Clip.of(sd) if sd.clip is not None else None)
        if self.clip is None and (sd.reader is None or prompts.scenes is None):
            raise UserError("nothing here can judge this model's images: name a CLIP with -p clip_model")
        self.reference = None
        enough = len(prompts) >= FEWEST and len(set(prompts.groups)) >= FEWEST_SCENES
        if reference is not None and self.clip is not None and enough:
            if len(set(reference.groups or range(len(reference.images)))) < FEWEST_SCENES:
                raise UserError(f"name a reference with at least {FEWEST_SCENES} images, or none")
            self.reference = reference._replace(images=self.clip.embed_images(reference.images))
        self._measured: dict[Variant, dict[str, Tensor]] = {}
        self.images = cached_images(sd, prompts.texts, **self.settings)
        self.trace = None
        if noise_images:
            self.traced = prompts.texts[:noise_images]
            self.trace = cached_trace(sd, self.traced, **self.settings)
            self.wanted = self._predictions(sd.unet)
            self.weights = self._step_weights()
        self.scores = self._scores(self.images)
        for metric, values in self.scores.items():
            self._record(FP32, metric, values)
        self._record_frechet(FP32, self.images)

    @classmethod
    def of(
        cls, run: Run, sd: StableDiffusion, prompts: Prompts, name: str = "test", **settings: Any
    ) -> PairedStudy:
        """A study with the judges that the run's parameters name; `name` is the prompt set of `prompts`."""
        p = run.parameters
        return cls(
            run,
            sd,
            prompts,
            reference=reference_images(sd, prompts, name, images=p["reference"], seed=p["seed"] + 4),
            clip=Clip.load(p["clip_model"], run.device) if p["clip_model"] else None,
            noise_images=min(p["noise_images"], len(prompts)),
            **settings,
        )

    def measure(self, variant: Variant, unet: nn.Module) -> Tensor | None:
        """Generate with the variant's `unet` and record everything.

        Returns the first `shown` images, `(shown, 3, H, W)`, or None for a variant that failed.
        """
        settings = self.settings | ({"steps": variant.steps} if variant.steps else {})
        try:
            images = cached_images(self.sd.replace(unet=unet), self.prompts.texts, **settings)
            errors = {} if self.trace is None or variant.steps else self._branch_errors(unet)
        except NonFiniteError as error:
            self._row(variant, FAILED, 1, unit=str(error))
            return None
        found = self._scores(images)
        pairs = self._record_scores(variant, found, images)
        self._measured[variant] = found | pairs | self._record_noise(variant, errors)
        return images[: self.shown].clone()  # a slice would keep all images in memory

    def compare(self, variant: Variant, to: Variant) -> None:
        """Record the paired differences of one measured variant to another, by every metric.

        PSNR is a mean over images in decibels; here the squared errors behind it are compared.

        Raises ValueError where one of them was not measured.
        """
        for needed in (variant, to):
            if needed not in self._measured:
                raise ValueError(f"measure {needed.label!r} before comparing it")
        for metric, values in self._measured[variant].items():
            groups = self.prompts.groups[: len(values)]
            change = paired_difference(values, self._measured[to][metric], groups)
            self._row(variant, f"{metric} difference", change, unit=_unit(metric), baseline=to)

    def losses(self, variant: Variant, metric: str) -> Tensor:
        """A measured variant's scores minus the baseline's, image by image, `(N,)`; int8 for bool scores."""
        kind = torch.int8 if self.scores[metric].dtype == torch.bool else torch.double
        return self._measured[variant][metric].to(kind) - self.scores[metric].to(kind)

    def noise_errors(self, unet: nn.Module) -> Tensor:
        """Squared error of a UNet's noise predictions along the baseline's path, `(S, noise_images)`.

        Raises NonFiniteError where a prediction is not finite.
        """
        return self._branch_errors(unet)["guided"]

    def _predictions(self, unet: nn.Module) -> Tensor:
        asked = {
            name: self.settings[name]
            for name in ("guidance_scale", "negative_prompt", "batch_size", "progress")
            if name in self.settings
        }
        return path_predictions(self.sd, unet, self.traced, self.trace, **asked)

    def _branch_errors(self, unet: nn.Module) -> dict[str, Tensor]:
        scale = self.settings.get("guidance_scale")
        scale = self.sd.config.guidance_scale if scale is None else scale
        errors = branch_errors(self._predictions(unet), self.wanted, scale)
        finite = errors["guided"].isfinite().all(1).tolist()
        if not all(finite):
            timestep = self.trace.timesteps[finite.index(False)].item()
            raise NonFiniteError(
                f"at timestep {timestep} of the baseline's path the noise predictions are not finite"
            )
        return errors

    def _step_weights(self) -> Tensor:
        """The share of each step `(S, 1)` in the weighted error; they add up to 1."""
        sampler, steps = self.settings.get("sampler", SAMPLER), self.settings.get("steps", STEPS)
        squared = step_weights(sampler, self.sd.schedule, steps, len(self.trace.timesteps)).square()
        shares = squared / squared.sum()
        for timestep, share in zip(self.trace.timesteps.tolist(), shares.tolist(), strict=True):
            self._row(FP32, "weight of the step", share, timestep=timestep)
        return shares[:, None]

    def _scores(self, images: Tensor) -> dict[str, Tensor]:
        found = scores(self.sd, images, self.prompts, self.clip)
        if self.reference is not None:
            features, (theirs, scenes) = self.clip.embed_images(images), self.reference
            found["KID"] = 1000 * kid_values(features, theirs, self.prompts.groups, scenes)
        return found

    def _row(self, variant: Variant, metric: str, found: Estimate | float, **more: Any) -> None:
        self.run.record(variant, metric, found, **self.about, **more)

    def _record(
        self, variant: Variant, metric: str, values: Tensor, to: Variant | None = None, **about: Any
    ) -> None:
        """Record the mean of scores, and keep them image by image; `to` is what they are measured against."""
        groups = self.prompts.groups[: len(values)]
        found, baseline = estimate(values, groups), to or ""
        self._row(variant, metric, found, unit=_unit(metric), baseline=baseline, **about)
        self.run.images.keep(variant, metric, values, groups, **self.about, **about)

    def _record_scores(self, variant: Variant, found: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Record scores and their differences; returns the comparisons with the baseline's images."""
        groups = self.prompts.groups
        for metric, values in found.items():
            self._record(variant, metric, values)
            change = paired_difference(values, self.scores[metric], groups)
            self._row(variant, f"{metric} difference", change, unit=_unit(metric), baseline=FP32)
        self._record_frechet(variant, images)
        pairs = {SQUARED: squared_errors(images, self.images), "SSIM": ssim(images, self.images)}
        self._row(variant, "PSNR", decibels(pairs[SQUARED], groups), unit="dB", baseline=FP32)
        self.run.images.keep(variant, SQUARED, pairs[SQUARED], groups, **self.about)
        self._record(variant, "SSIM", pairs["SSIM"], FP32)
        return pairs

    def _record_frechet(self, variant: Variant, images: Tensor) -> None:
        if self.reference is None:
            return
        features, theirs = self.clip.embed_images(images), self.reference.images
        n, d = min(len(features), len(theirs)), features.shape[1]
        if n > d:
            distance = frechet_distance(features, theirs)
            few = "; n < 10 d: biased" if n < 10 * d else ""
            self._row(variant, "Frechet distance", distance, unit=f"n = {n}, d = {d}{few}")

    def _record_noise(self, variant: Variant, errors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Record the squared errors `(S, N)` of the guided prediction and its branches; returns the means."""
        means = {}
        for branch, squared in errors.items():
            metric = "noise MSE" if branch == "guided" else f"noise MSE of the {branch}"
            means |= {metric: squared.mean(0), f"weighted {metric}": (self.weights * squared).sum(0)}
            for timestep, values in zip(self.trace.timesteps.tolist(), squared, strict=True):
                self._record(variant, f"{metric} at timestep", values, FP32, timestep=timestep)
        for metric, values in means.items():
            self._record(variant, metric, values, FP32)
        return means


def _unit(metric: str) -> str:
    return {"KID": "x 1000", **UNITS}.get(metric, "")
