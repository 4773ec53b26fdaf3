"""The calibrations and the conditions of generation that 07_conditions compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdcomp.model import SAMPLERS
from sdcomp.quantization import PRESETS, Recipe
from sdcomp.quantization.calibration import CALIBRATION_SAMPLER
from sdcomp.quantization.observer import UPDATE_POLICIES
from sdcomp.quantization.quantizer import SCALE_METHODS

POLICIES = {
    **{name: {"act_scale_policy": name} for name in SCALE_METHODS},
    **{name: {"act_update_policy": name} for name in UPDATE_POLICIES},
}
"""Policies by name, as arguments of `Calibrator`: the range of one call, or how calls are combined."""


@dataclass(frozen=True)
class Calibrated:
    """How a preset is calibrated: on how many prompts, which draw of them, and how the model runs."""

    prompts: int
    draw: int = 0
    sampler: str = CALIBRATION_SAMPLER
    policy: str = ""
    """A name in `POLICIES`; empty: the preset's own."""

    @property
    def label(self) -> str:
        """A text that no other calibration has: "16 prompts, draw 2, ddim, merged"."""
        sampler = "" if self.sampler == CALIBRATION_SAMPLER else self.sampler
        plural = "s" if self.prompts > 1 else ""
        parts = (f"{self.prompts} prompt{plural}", f"draw {self.draw + 1}", sampler, self.policy)
        return ", ".join(part for part in parts if part)

    def recipe(self, preset: str) -> Recipe:
        """The preset with this policy."""
        recipe = PRESETS[preset]
        return replace(recipe, calibrator={**recipe.calibrator, **POLICIES.get(self.policy, {})})

    def settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The study's `calibration_settings` for this calibration.

        They have the prompts of all draws. Each draw takes the next ones, and starts from other noise.
        """
        first = self.draw * self.prompts
        return {
            **own,
            "prompts": own["prompts"][first : first + self.prompts],
            "sampler": self.sampler,
            "seed": own["seed"] + self.draw,
            "batch_size": min(self.prompts, own["batch_size"]),
        }


def calibrations(
    preset: str, prompts: Sequence[int], draws: int, samplers: Sequence[str], policies: Sequence[str]
) -> list[Calibrated]:
    """Every number of prompts in every draw; then one change at a time of the first calibration.

    A sampler or a policy that changes nothing is left out.
    """
    first = Calibrated(prompts[0])
    found = [Calibrated(n, draw) for n in sorted(prompts) for draw in range(draws)]
    found += [replace(first, sampler=sampler) for sampler in samplers]
    changed = [replace(first, policy=policy) for policy in policies]
    found += [other for other in changed if other.recipe(preset) != PRESETS[preset]]
    return list(dict.fromkeys(found))


def with_products(preset: str) -> Recipe:
    """The preset that also quantizes the products of attention."""
    recipe = PRESETS[preset]
    return replace(recipe, model={**recipe.model, "quantize_attention_products": True})


@dataclass(frozen=True)
class Condition:
    """How images are generated."""

    sampler: str
    steps: int
    guidance_scale: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Condition:
        """The condition of some arguments of `generate`."""
        return cls(settings["sampler"], settings["steps"], settings["guidance_scale"])

    @property
    def label(self) -> str:
        """The condition in words: "ddim, 20 steps, guidance 4"."""
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance_scale:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        return dict(vars(self))

    @property
    def about(self) -> dict[str, Any]:
        """What results under this condition say of themselves."""
        return {
            "sampler": self.sampler,
            "sampling_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }


def condition(text: str, own: Condition) -> Condition:
    """The condition that a text asks for; it is `own` in all that the text does not name.

    The words are a sampler, a number before `steps`, and a number after `guidance`: "dpmpp_2m",
    "10 steps", "ddpm 40 steps guidance 8". Raises ValueError for other words, and for a word said twice.
    """
    found: dict[str, Any] = {}
    words = text.split()
    while words:
        word, after = words[0], words[1] if len(words) > 1 else ""
        if word in SAMPLERS:
            name, value, used = "sampler", word, 1
        elif word == "guidance":
            name, value, used = "guidance_scale", float(after), 2
        elif after == "steps":
            name, value, used = "steps", int(word), 2
        else:
            raise ValueError(f"a condition has a sampler, a number of steps or a guidance, not {word!r}")
        if name in found:
            raise ValueError(f"{text!r} names the {name} twice")
        found[name], words = value, words[used:]
    if not found:
        raise ValueError("a condition names a sampler, a number of steps or a guidance")
    return replace(own, **found)
