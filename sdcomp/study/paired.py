"""The paired protocol: every variant draws the same prompts from the same noise as the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sdcomp import scenes
from sdcomp.errors import NonFiniteError, UserError
from sdcomp.evaluation import (
    UNITS,
    Clip,
    Prompts,
    cached_images,
    cached_trace,
    estimate,
    frechet_distance,
    kid_values,
    load_images,
    load_prompts,
    noise_mse,
    paired_difference,
    psnr,
    scores,
    ssim,
)
from sdcomp.study.results import FAILED
from sdcomp.study.variants import FP32, Variant

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


HALVES = ("test", "final")
"""Two prompt sets that were drawn together, 256 prompts each. No choice is made on "final"."""
FEWEST = 32
"""With fewer images, distances between sets of images say nothing."""


def reference_images(
    sd: StableDiffusion, prompts: Prompts, name: str, *, images: str = "", seed: int = 0
) -> Tensor | None:
    """The images that distances between sets are measured to, `(N, 3, H, W)` in [0, 1].

    These are the `images` of a file or folder where one is named. Otherwise, for prompts that have scenes,
    they are rendered scenes: those of both `HALVES` where `name` is one of them, else those of `prompts`. For
    other prompts there are none.
    """
    if images:
        return load_images(images, sd.config.image_size)
    if prompts.scenes is None:
        return None
    drawn = prompts.scenes
    if name in HALVES:
        drawn = [scene for half in HALVES for scene in load_prompts(sd, half, 256).scenes]
    return scenes.render(drawn, seed)


class PairedStudy:
    """Measures variants of a model's UNet beside the UNet itself, and records the results.

    Recorded for each variant: the scores of its images (`scores`); PSNR and SSIM to the baseline's images;
    the squared error of its noise predictions along the baseline's path, for the first `noise_images`
    prompts; from 32 images on the Kernel Inception Distance (x 1000) and, with more images than features,
    the Frechet distance to `reference`. Scores and KID also as paired differences to the baseline.

    A variant that gives infinite values or NaN has failed. Then its only row says so, with the reason.
    """

    def __init__(
        self,
        run: Run,
        sd: StableDiffusion,
        prompts: Prompts,
        *,
        reference: Tensor | None = None,
        clip: Clip | None = None,
        noise_images: int = 0,
        shown: int = 8,
        **settings: Any,
    ) -> None:
        """`settings` are arguments of `generate`; `shown` images of each variant are kept, for figures.

        Raises UserError where nothing can judge the images: `clip` is not given, and the model has neither
        an image encoder nor a reader for these prompts.
        """
        self.run, self.sd, self.prompts = run, sd, prompts
        self.settings, self.shown = {**settings, "progress": run.progress}, shown
        self.clip = clip or (Clip.of(sd) if sd.clip is not None else None)
        if self.clip is None and (sd.reader is None or prompts.scenes is None):
            raise UserError("nothing here can judge this model's images: name a CLIP with -p clip_model")
        self.reference = None
        if reference is not None and self.clip is not None and len(prompts) >= FEWEST:
            self.reference = self.clip.embed_images(reference)
        self._measured: dict[Variant, dict[str, Tensor]] = {}
        self.images = cached_images(sd, prompts.texts, **self.settings)
        self.trace = None
        if noise_images:
            self.traced = prompts.texts[:noise_images]
            self.trace = cached_trace(sd, self.traced, **self.settings)
        self.scores = self._scores(self.images)
        for metric, values in self.scores.items():
            run.record(FP32, metric, estimate(values, prompts.groups), unit=_unit(metric))
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
        try:
            images = cached_images(self.sd.replace(unet=unet), self.prompts.texts, **self.settings)
            errors = None if self.trace is None else self.noise_errors(unet)
        except NonFiniteError as error:
            self.run.record(variant, FAILED, 1, unit=str(error))
            return None
        found = self._scores(images)
        self._record_scores(variant, found, images)
        if errors is not None:
            found["noise MSE"] = errors.mean(0)
            self._record_noise(variant, errors)
        self._measured[variant] = found
        return images[: self.shown].clone()  # a slice would keep all images in memory

    def compare(self, variant: Variant, to: Variant) -> None:
        """Record the paired differences of one measured variant to another: scores, KID and noise MSE.

        Raises ValueError where one of them was not measured.
        """
        for needed in (variant, to):
            if needed not in self._measured:
                raise ValueError(f"measure {needed.label!r} before comparing it")
        for metric, values in self._measured[variant].items():
            groups = self.prompts.groups[: len(values)]
            change = paired_difference(values, self._measured[to][metric], groups)
            self.run.record(variant, f"{metric} difference", change, unit=_unit(metric), baseline=to)

    def noise_errors(self, unet: nn.Module) -> Tensor:
        """Squared error of a UNet's noise predictions along the baseline's path, `(S, noise_images)`.

        Raises NonFiniteError where a prediction is not finite.
        """
        errors = noise_mse(
            self.sd,
            unet,
            self.traced,
            self.trace,
            guidance_scale=self.settings.get("guidance_scale"),
            negative_prompt=self.settings.get("negative_prompt", ""),
            batch_size=self.settings.get("batch_size"),
            progress=self.run.progress,
        )
        finite = errors.isfinite().all(1).tolist()
        if not all(finite):
            timestep = self.trace.timesteps[finite.index(False)].item()
            raise NonFiniteError(
                f"at timestep {timestep} of the baseline's path the noise predictions are not finite"
            )
        return errors

    def _scores(self, images: Tensor) -> dict[str, Tensor]:
        found = scores(self.sd, images, self.prompts, self.clip)
        if self.reference is not None:
            found["KID"] = 1000 * kid_values(self.clip.embed_images(images), self.reference)
        return found

    def _record_scores(self, variant: Variant, found: dict[str, Tensor], images: Tensor) -> None:
        record, groups = self.run.record, self.prompts.groups
        for metric, values in found.items():
            change = paired_difference(values, self.scores[metric], groups)
            record(variant, metric, estimate(values, groups), unit=_unit(metric))
            record(variant, f"{metric} difference", change, unit=_unit(metric), baseline=FP32)
        self._record_frechet(variant, images)
        record(variant, "PSNR", psnr(images, self.images, groups), unit="dB", baseline=FP32)
        record(variant, "SSIM", estimate(ssim(images, self.images), groups), baseline=FP32)

    def _record_frechet(self, variant: Variant, images: Tensor) -> None:
        if self.reference is None:
            return
        features = self.clip.embed_images(images)
        n, d = min(len(features), len(self.reference)), features.shape[1]
        if n > d:
            distance = frechet_distance(features, self.reference)
            few = "; n < 10 d: biased" if n < 10 * d else ""
            self.run.record(variant, "Frechet distance", distance, unit=f"n = {n}, d = {d}{few}")

    def _record_noise(self, variant: Variant, errors: Tensor) -> None:
        record, groups = self.run.record, self.prompts.groups[: errors.shape[1]]
        record(variant, "noise MSE", estimate(errors.mean(0), groups), baseline=FP32)
        for timestep, values in zip(self.trace.timesteps.tolist(), errors, strict=True):
            found = estimate(values, groups)
            record(variant, "noise MSE at timestep", found, baseline=FP32, timestep=timestep)


def _unit(metric: str) -> str:
    return {"KID": "x 1000", "noise MSE": "", **UNITS}[metric]
