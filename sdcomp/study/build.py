"""From a variant to its UNet, in the same way for every study."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sdcomp.errors import UserError
from sdcomp.evaluation import load_prompts
from sdcomp.export import OpenVINOUNet, export, load_openvino
from sdcomp.integer import to_int8, to_packed
from sdcomp.pruning import (
    IMPORTANCES,
    Calibration,
    calibrate,
    n_m_budgets,
    prune_n_m,
    prune_structured,
    prune_unstructured,
    remove_cheapest,
)
from sdcomp.quantization import (
    PRESETS,
    QuantModel,
    Recipe,
    apply_recipe,
    build,
    load_quant_model,
    save_quant_model,
)
from sdcomp.quantization.calibration import CALIBRATION_SAMPLER
from sdcomp.study.rounding import KeptRounding, take_rounding
from sdcomp.study.variants import Variant, quantized
from sdcomp.training import recover

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run


def calibration_settings(
    run: Run, sd: StableDiffusion, prompts: str = "calibration", negative_prompt: str = "", n: int = 0
) -> dict[str, Any]:
    """The arguments of `sd.generate` for a calibration, from a run's parameters.

    `prompts` is a prompt set or a file; the first `n` of it are taken, by default the parameter
    `n_calibration`. Calibration starts from noise, so every timestep interval is reached.
    """
    p, own = run.parameters, run.generation(sd)
    n = n or p["n_calibration"]
    return {
        "prompts": load_prompts(sd, prompts, n).texts,
        "steps": p.get("calibration_steps") or p["steps"],
        "sampler": p.get("calibration_sampler", CALIBRATION_SAMPLER),
        "guidance_scale": own["guidance_scale"],
        "negative_prompt": negative_prompt,
        "batch_size": min(n, own["batch_size"]),
        "seed": p["seed"] + 1,
        "progress": run.progress,
    }


class Builder:
    """Builds the UNets of variants.

    It keeps the last simulation, because int8 and packed weights are made from it; the last second-order
    rounding, because variants that differ in their activations alone share it; and what the importance of
    weights needs to know of their inputs.
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
        """`calibration` are arguments of `sd.generate`, for activations and for the importance of weights.

        None: activations are not calibrated, and importance is magnitude.
        `model`, `calibrator` and `weights` replace arguments of a recipe (see `sdcomp.quantization.Recipe`).
        `recipes` are those that variants name.
        """
        self.run, self.sd, self.calibration = run, sd, calibration
        self.model, self.calibrator, self.weights = model or {}, calibrator or {}, weights or {}
        self.recipes = recipes
        self.rounding = KeptRounding()
        self._last: tuple[Variant, QuantModel] | None = None
        self._seen: Calibration | None = None

    def build(self, variant: Variant) -> nn.Module:
        """The UNet of `variant`: pruned, recovered, quantized and converted to integers, as it says.

        Calibration runs at its own steps, so the UNet is the same for all `variant.steps`.
        """
        variant = replace(variant, steps=0)
        if not variant.recipe:
            return self.pruned(variant)
        if variant.calibrated_first:
            return self._calibrated_first(variant)
        simulated = self.calibrated(variant.simulation)
        if variant.execution == "packed":
            return to_packed(simulated)
        if variant.execution == "openvino":
            return self._exported(simulated)
        return simulated if variant.execution == "simulated" else to_int8(simulated)

    def pruned(self, variant: Variant) -> nn.Module:
        """A pruned copy of the UNet, recovered where the variant says so; without pruning the UNet itself.

        A recovery uses up to 128 calibration prompts, four for each image of the study. Its checkpoint and
        that of second-order zeros are in the run's folder, and a killed run resumes from there.
        """
        if not variant.pruning:
            return self.sd.unet
        unet = self._removed(variant) if variant.pruning == "removed" else self._zeroed(variant)
        return self._recovered(variant, unet) if variant.recover_steps else unet

    def _zeroed(self, variant: Variant) -> nn.Module:
        unet, amount = self.sd.unet, variant.amount
        if variant.pruning == "masked channels":
            return prune_structured(unet, amount, mode="mask", n=1 if variant.importance == "l1" else 2)
        how = self._importance(variant)
        how |= {"parts": [variant.block]} if variant.block else {}
        if variant.pruning == "unstructured":
            return prune_unstructured(unet, amount, scope=variant.scope, **how)
        n, m = map(int, variant.pattern.split(":"))
        if variant.scope == "global":
            data = how.get("calibration") or self.seen(gradients=True)
            n = n_m_budgets(unet, n / m, m, choices=(max(n // 2, 1), n), calibration=data)
        return prune_n_m(unet, n, m, **how)

    def _removed(self, variant: Variant) -> nn.Module:
        if variant.scope == "global":
            return remove_cheapest(self.sd.unet, variant.amount, self.seen(gradients=True))
        how = self._importance(variant) or {"criterion": variant.importance or "l2"}
        return prune_structured(self.sd.unet, variant.amount, mode="remove", **how)

    def _importance(self, variant: Variant) -> dict[str, Any]:
        """The arguments of pruning that say how a variant finds what matters; none if by magnitude."""
        name = variant.importance
        if name not in IMPORTANCES:
            return {}
        # A pattern, or the weights of one layer by Wanda, need no gradients of the output.
        rows_alone = name == "wanda" or variant.pruning == "pattern"
        gradients = variant.scope == "global" or not rows_alone
        how = {"importance": name, "calibration": self.seen(gradients)}
        if name == "second_order" and variant.pruning != "removed":
            how["checkpoint"] = self._checkpoint(replace(variant.unquantized, recover_steps=0))
            how["inputs"] = repr({**self.calibration, "progress": False, "gradients": gradients})
        return how

    def seen(self, gradients: bool = False) -> Calibration:
        """What the importance of weights needs to know of the UNet's layers, gathered once.

        Raises UserError if the study has no calibration.
        """
        if self._seen is None or (gradients and not self._seen.gradients):
            if self.calibration is None:
                raise UserError(
                    "importance other than magnitude needs a calibration: give one to the Builder"
                )
            generation = dict(self.calibration)
            prompts = generation.pop("prompts")
            run = partial(self.sd.generate, prompts, pad=False, **generation)
            self._seen = calibrate(self.sd.unet, run, gradients=gradients, seed=self.run.parameters["seed"])
        return self._seen

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
            lambda: sd.generate(prompts, pad=False, progress=progress, **settings),
            checkpoint=self._checkpoint(variant),
            inputs=f"{prompts} {settings}",
            progress=progress,
        )
        self.rounding.keep(made, variant.unquantized, recipe)
        made.calibration |= {"prompts": len(prompts), **settings}

    def _checkpoint(self, variant: Variant) -> Path:
        """The file from which a killed run of these parameters resumes work on this variant."""
        name = re.sub(r"\W+", "_", variant.label)
        return self.run.folder / f"{name}_{self.run.id}.ckpt"

    def _calibrated_first(self, variant: Variant) -> QuantModel:
        """The pruned UNet, with the scales of the UNet before pruning; methods round its own weights."""
        bits = variant.weight_bits, variant.act_bits
        whole = quantized(variant.recipe, *bits, variant.k, execution=variant.execution)
        with tempfile.TemporaryDirectory() as folder:
            save_quant_model(self.calibrated(whole), folder)
            made = load_quant_model(folder, self.pruned(variant.unquantized))
        if self.recipe(variant).methods:
            take_rounding(made, self.calibrated(replace(variant, calibrated_first=False)))
        return made

    def _exported(self, simulated: QuantModel) -> OpenVINOUNet:
        """The UNet in OpenVINO, which keeps the loaded model after the folder is deleted."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "unet.xml")
            return load_openvino(export(self.sd.replace(unet=simulated), file, format="openvino"))

    def _recovered(self, variant: Variant, unet: nn.Module) -> nn.Module:
        p = self.run.parameters
        return recover(
            unet,
            self.sd,
            load_prompts(self.sd, p["calibration_prompts"], min(4 * p["n_images"], 128)).texts,
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
