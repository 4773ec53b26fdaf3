"""The paired protocol: every variant draws the same prompts from the same noise as its baseline."""

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
from sdcomp.study.run import FAILED

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


FEWEST = 32
"""Images below which a distance between sets says nothing."""


def reference_images(
    sd: StableDiffusion, prompts: Prompts, name: str, *, images: str = "", seed: int = 0
) -> Tensor | None:
    """What distances between sets are measured to, `(N, 3, H, W)` in [0, 1].

    The `images` of a file or folder where that is named. Else, for prompts that have scenes, rendered
    scenes: 512 of the prompt set `name`, or those of `prompts` where it has fewer. Else None.
    """
    if images:
        return load_images(images, sd.config.image_size)
    if prompts.scenes is None:
        return None
    try:
        drawn = load_prompts(sd, name, 512).scenes
    except UserError:
        drawn = prompts.scenes
    return scenes.render(drawn, seed)


class PairedStudy:
    """Measures variants of a model's UNet against the UNet itself and records what is found.

    Of each variant are recorded: the scores of its images (`scores`); from 32 images on the Kernel Inception
    Distance (x 1000) and, with more images than features, the Frechet distance to `reference`; PSNR and
    SSIM to the baseline's images; the noise predictions' mean squared error along the baseline's path, for
    the first `noise_images` prompts. Scores and KID also as paired differences to the baseline.

    A variant that gives infinite values or NaN has failed: that is its one row, with the reason.
    """

    def __init__(
        self,
        run: Run,
        sd: StableDiffusion,
        prompts: Prompts,
        *,
        baseline: str,
        reference: Tensor | None = None,
        clip: Clip | None = None,
        noise_images: int = 0,
        shown: int = 8,
        **settings: Any,
    ) -> None:
        """`baseline` names the model as it is; `settings` go to `generate`.

        `shown` is how many images of a variant are kept, for figures. Raises UserError where nothing can
        judge the images: the model has neither a reader for these prompts nor an image encoder, and no
        `clip` is given.
        """
        self.run, self.sd, self.prompts, self.name = run, sd, prompts, baseline
        self.settings, self.shown = {**settings, "progress": run.progress}, shown
        self.clip = clip or (Clip.of(sd) if sd.clip is not None else None)
        if self.clip is None and (sd.reader is None or prompts.scenes is None):
            raise UserError("nothing here can judge this model's images: name a CLIP with -p clip_model")
        self.reference = None
        if reference is not None and self.clip is not None and len(prompts) >= FEWEST:
            self.reference = self.clip.embed_images(reference)
        self._measured: dict[tuple[str, frozenset], dict[str, Tensor]] = {}
        self.images = cached_images(sd, prompts.texts, **self.settings)
        self.trace = None
        if noise_images:
            self.traced = prompts.texts[:noise_images]
            self.trace = cached_trace(sd, self.traced, **self.settings)
        self.scores = self._scores(self.images)
        for metric, values in self.scores.items():
            run.record(baseline, metric, estimate(values, prompts.groups), unit=_unit(metric))
        self._record_frechet(baseline, self.images)

    def measure(self, method: str, unet: nn.Module, **parameters: Any) -> Tensor | None:
        """Generate with `unet` in the model's place and record everything.

        Returns the first `shown` images, `(shown, 3, H, W)`; the others are let go. None for a variant that
        failed.
        """
        try:
            images = cached_images(self.sd.replace(unet=unet), self.prompts.texts, **self.settings)
            errors = None if self.trace is None else self.noise_errors(unet)
        except NonFiniteError as error:
            self.run.record(method, FAILED, 1, unit=str(error), **parameters)
            return None
        found = self._scores(images)
        self._record_scores(method, found, images, **parameters)
        if errors is not None:
            found["noise MSE"] = errors.mean(0)
            self._record_noise(method, errors, **parameters)
        self._measured[method, frozenset(parameters.items())] = found
        return images[: self.shown].clone()  # a slice alone would keep all of them

    def compare(self, method: str, to: str, **parameters: Any) -> None:
        """Record the paired differences of one measured variant to another: scores, KID and noise MSE.

        `parameters` are those that `method` was measured with; the variant of `to` is the one whose own are
        among them. Raises ValueError where either was not measured.
        """
        asked = frozenset(parameters.items())
        variant = self._measured.get((method, asked))
        other = next((v for (name, own), v in self._measured.items() if name == to and own <= asked), None)
        if variant is None or other is None:
            raise ValueError(f"measure {to if variant else method!r} with {parameters} before comparing it")
        for metric, values in variant.items():
            change = paired_difference(values, other[metric], self.prompts.groups[: len(values)])
            unit = _unit(metric)
            self.run.record(method, f"{metric} difference", change, unit=unit, baseline=to, **parameters)

    def _scores(self, images: Tensor) -> dict[str, Tensor]:
        found = scores(self.sd, images, self.prompts, self.clip)
        if self.reference is not None:
            found["KID"] = 1000 * kid_values(self.clip.embed_images(images), self.reference)
        return found

    def _record_scores(
        self, method: str, found: dict[str, Tensor], images: Tensor, **parameters: Any
    ) -> None:
        groups, to = self.prompts.groups, {"baseline": self.name, **parameters}
        for metric, values in found.items():
            change = paired_difference(values, self.scores[metric], groups)
            self.run.record(method, metric, estimate(values, groups), unit=_unit(metric), **parameters)
            self.run.record(method, f"{metric} difference", change, unit=_unit(metric), **to)
        self._record_frechet(method, images, **parameters)
        self.run.record(method, "PSNR", psnr(images, self.images, groups), unit="dB", **to)
        self.run.record(method, "SSIM", estimate(ssim(images, self.images), groups), **to)

    def _record_frechet(self, method: str, images: Tensor, **parameters: Any) -> None:
        if self.reference is None:
            return
        features = self.clip.embed_images(images)
        n, d = min(len(features), len(self.reference)), features.shape[1]
        if n > d:
            distance = frechet_distance(features, self.reference)
            few = "; n < 10 d: biased" if n < 10 * d else ""
            self.run.record(method, "Frechet distance", distance, unit=f"n = {n}, d = {d}{few}", **parameters)

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

    def _record_noise(self, method: str, errors: Tensor, **parameters: Any) -> None:
        groups = self.prompts.groups[: errors.shape[1]]
        to = {"baseline": self.name, **parameters}
        self.run.record(method, "noise MSE", estimate(errors.mean(0), groups), **to)
        for timestep, values in zip(self.trace.timesteps.tolist(), errors, strict=True):
            self.run.record(
                method, "noise MSE at timestep", estimate(values, groups), timestep=timestep, **to
            )


def _unit(metric: str) -> str:
    return {"KID": "x 1000", "noise MSE": "", **UNITS}[metric]
