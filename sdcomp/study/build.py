"""From a variant to its UNet, in the same way for every study."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sdcomp.evaluation import load_prompts
from sdcomp.export import OpenVINOUNet, export, load_openvino
from sdcomp.integer import to_int8
from sdcomp.pruning import prune_structured, prune_unstructured
from sdcomp.quantization import (
    PRESETS,
    QuantModel,
    Recipe,
    apply_recipe,
    build,
    load_quant_model,
    save_quant_model,
)
from sdcomp.quantization.calibration import SAMPLER
from sdcomp.study.rounding import KeptRounding
from sdcomp.study.variants import Variant
from sdcomp.training import recover

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


def calibration_settings(
    run: Run, sd: StableDiffusion, prompts: str = "calibration", negative_prompt: str = ""
) -> dict[str, Any]:
    """The arguments of `sd.generate` for a calibration, from a run's parameters.

    `prompts` is a prompt set or a file. Calibration starts from noise, so every timestep interval is reached.
    """
    p, own = run.parameters, run.generation(sd)
    return {
        "prompts": load_prompts(sd, prompts, p["n_calibration"]).texts,
        "steps": p.get("calibration_steps") or p["steps"],
        "sampler": p.get("calibration_sampler", SAMPLER),
        "guidance_scale": own["guidance_scale"],
        "negative_prompt": negative_prompt,
        "batch_size": min(p["n_calibration"], own["batch_size"]),
        "seed": p["seed"] + 1,
        "progress": run.progress,
    }


class Builder:
    """Builds the UNets of variants.

    It keeps the last simulation, because int8 is made from it, and the last second-order rounding, because
    variants that differ in their activations alone share it.
    """

    def __init__(
        self,
        run: Run,
        sd: StableDiffusion,
        calibration: Mapping[str, Any] | None = None,
        *,
        model: Mapping[str, Any] | None = None,
        calibrator: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        recipes: Mapping[str, Recipe] = PRESETS,
    ) -> None:
        """`calibration` are arguments of `sd.generate`; None: activations are not calibrated.

        `model`, `calibrator` and `weights` replace arguments of a recipe (see `sdcomp.quantization.Recipe`).
        `recipes` are those that variants name.
        """
        self.run, self.sd, self.calibration = run, sd, calibration
        self.model, self.calibrator, self.weights = model or {}, calibrator or {}, weights or {}
        self.recipes = recipes
        self.rounding = KeptRounding()
        self._last: tuple[Variant, QuantModel] | None = None

    def build(self, variant: Variant) -> nn.Module:
        """The UNet of `variant`: pruned, recovered, quantized and converted to integers, as it says."""
        if not variant.recipe:
            return self.pruned(variant)
        if variant.calibrated_first:
            return self._calibrated_first(variant)
        simulated = self.calibrated(variant.simulation)
        if variant.execution == "openvino":
            return self._exported(simulated)
        return simulated if variant.execution == "simulated" else to_int8(simulated)

    def pruned(self, variant: Variant) -> nn.Module:
        """A pruned copy of the UNet, recovered where the variant says so; without pruning the UNet itself.

        A recovery uses up to 128 calibration prompts, four for each image of the study. Its checkpoint is in
        the run's folder, and a killed run resumes from there.
        """
        amount, norm = variant.amount, variant.criterion or "l2"
        if not variant.pruning:
            return self.sd.unet
        if variant.pruning == "unstructured":
            parts = {"parts": [variant.block]} if variant.block else {}
            unet = prune_unstructured(self.sd.unet, amount, scope=variant.scope, **parts)
        elif variant.pruning == "masked channels":
            unet = prune_structured(self.sd.unet, amount, mode="mask", n=int(norm[1]))
        else:
            unet = prune_structured(self.sd.unet, amount, mode="remove", criterion=norm)
        return self._recovered(variant, unet) if variant.recover_steps else unet

    def quantized(self, variant: Variant, unet: nn.Module) -> QuantModel:
        """The simulated quantization of `unet`, neither calibrated nor changed by the recipe's methods."""
        steps = self.calibration["steps"] if self.calibration else 1
        return build(
            self.recipe(variant),
            unet,
            min(variant.weight_bits, 8),
            min(variant.act_bits, 8),
            k=max(variant.k, 1),
            timesteps=max(variant.k, steps),
            **self.model,
        )

    def recipe(self, variant: Variant) -> Recipe:
        """The variant's recipe, with this study's arguments."""
        named = self.recipes[variant.recipe]
        weights, calibrator = {**named.weights, **self.weights}, {**named.calibrator, **self.calibrator}
        return replace(named, weights=weights, calibrator=calibrator)

    def calibrated(self, variant: Variant) -> QuantModel:
        """The calibrated simulation of a variant. 32 bits mean no quantization."""
        if self._last is None or self._last[0] != variant:
            self._last = None  # free the memory first
            made = self.quantized(variant, self.pruned(variant.unquantized))
            if self.calibration is not None:
                self._calibrate(variant, made, **self.calibration)
            made.set_use_quant(weights=variant.weight_bits < 32, activations=variant.act_bits < 32)
            self._last = variant, made
        return self._last[1]

    def _calibrate(self, variant: Variant, made: QuantModel, prompts: list[str], **settings: Any) -> None:
        sd = self.sd.replace(unet=made)
        progress = settings.pop("progress", False)
        recipe = self.recipe(variant)
        known = self.rounding.take(made, variant.unquantized, recipe)
        apply_recipe(
            made,
            replace(recipe, methods=()) if known else recipe,
            lambda: sd.generate(prompts, progress=progress, **settings),
            checkpoint=self._checkpoint(variant),
            inputs=f"{prompts} {settings}",
            progress=progress,
        )
        self.rounding.keep(made, variant.unquantized, recipe)
        made.calibration |= {"prompts": len(prompts), **settings}

    def _checkpoint(self, variant: Variant) -> Path:
        """The file from which a killed run resumes work on this variant."""
        return self.run.folder / (re.sub(r"\W+", "_", variant.label) + ".ckpt")

    def _calibrated_first(self, variant: Variant) -> QuantModel:
        """The pruned UNet, with the scales of the UNet before pruning."""
        whole = replace(
            variant, pruning="", amount=0.0, scope="layer", recover_steps=0, calibrated_first=False
        )
        with tempfile.TemporaryDirectory() as folder:
            save_quant_model(self.calibrated(whole), folder)
            return load_quant_model(folder, self.pruned(variant.unquantized))

    def _exported(self, simulated: QuantModel) -> OpenVINOUNet:
        """The UNet in OpenVINO. What it has loaded stays when its files are gone."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "unet.xml")
            return load_openvino(export(self.sd.replace(unet=simulated), file, format="openvino"))

    def _recovered(self, variant: Variant, unet: nn.Module) -> nn.Module:
        p = self.run.parameters
        return recover(
            unet,
            self.sd,
            load_prompts(self.sd, "calibration", min(4 * p["n_images"], 128)).texts,
            variant.recover_steps,
            lr=5e-4,
            guidance_scale=self.run.generation(self.sd)["guidance_scale"],
            seed=p["seed"] + 5,
            checkpoint=self._checkpoint(variant.unquantized),
            progress=self.run.progress,
        ).module


def as_executed(variant: Variant, unet: nn.Module) -> Variant:
    """The variant with the real execution of its UNet: a machine may lack integer kernels."""
    dequantized = getattr(unet, "execution", "kernels") == "dequantized"
    return replace(variant, execution="int8 (dequantized)") if dequantized else variant
