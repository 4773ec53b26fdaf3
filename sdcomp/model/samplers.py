"""Samplers: from a noise prediction to the latents of the next step.

Each is a class with `timesteps`, the training timesteps that it visits, and
`step(i, latents, noise_prediction, noise)`, which goes from `timesteps[i]` to the next one. `noise` is
standard normal and has the shape of the latents; a deterministic sampler (`stochastic` is False) ignores it.
The settings are those of SD 1.x: the model predicts noise, and nothing is clipped.

As in diffusers, `DDIM` steps back by train_timesteps // steps. With trailing spacing and a number of steps
that does not divide train_timesteps, it lands up to one timestep beside the next one in `timesteps`.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sdcomp.model.schedule import NoiseSchedule
from sdcomp.settings import whole_number


class DDIM:
    """Deterministic DDIM (Song et al. 2021, equation 12 with sigma = 0)."""

    stochastic = False

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        self.schedule = schedule
        self.timesteps = schedule.spaced(steps, schedule.config.timestep_spacing).tolist()
        self._stride = schedule.config.train_timesteps // steps

    def step(self, i: int, latents: Tensor, noise_prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents at `timesteps[i]` -> latents one stride earlier."""
        alphas = self.schedule.alphas_cumprod
        t = self.timesteps[i]
        a = alphas[t].item()
        # SD 1.x ends at the noise level of the first timestep, not without noise (set_alpha_to_one=False).
        a_prev = alphas[max(t - self._stride, 0)].item()
        x0 = (latents - math.sqrt(1 - a) * noise_prediction) / math.sqrt(a)
        return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * noise_prediction


class DDPM:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, equations 6 and 7)."""

    stochastic = True

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        self.schedule = schedule
        self.timesteps = schedule.spaced(steps, schedule.config.timestep_spacing).tolist()

    def step(self, i: int, latents: Tensor, noise_prediction: Tensor, noise: Tensor) -> Tensor:
        """Latents at `timesteps[i]` -> a draw at `timesteps[i + 1]`; the last step returns the mean."""
        t = self.timesteps[i]
        last = i == len(self.timesteps) - 1
        a = self.schedule.alphas_cumprod[t].item()
        a_prev = 1.0 if last else self.schedule.alphas_cumprod[self.timesteps[i + 1]].item()
        alpha = a / a_prev
        beta = 1 - alpha
        x0 = (latents - math.sqrt(1 - a) * noise_prediction) / math.sqrt(a)
        mean = (math.sqrt(a_prev) * beta * x0 + math.sqrt(alpha) * (1 - a_prev) * latents) / (1 - a)
        variance = (1 - a_prev) / (1 - a) * beta
        return mean if last else mean + math.sqrt(variance) * noise


class DPMPP2M:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); the last step is of first order.

    It keeps the data prediction of the step before, so call `step` with i = 0, 1, 2, ... in turn. A first
    call at a later step (image-to-image) starts without history.
    """

    stochastic = False

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        self.schedule = schedule
        spacing = schedule.config.timestep_spacing
        self.timesteps = schedule.spaced(steps, spacing, intervals=steps + 1).tolist()
        alphas = schedule.alphas_cumprod.double()[self.timesteps]
        self._sigmas = [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]
        self._before: tuple[int, Tensor] | None = None

    def _log_snr(self, i: int) -> float:
        return -math.log(self._sigmas[i]) if self._sigmas[i] > 0 else math.inf

    def step(self, i: int, latents: Tensor, noise_prediction: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents at `timesteps[i]` -> latents at `timesteps[i + 1]`; after the last step without noise."""
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        alpha, alpha_next = 1 / math.sqrt(1 + sigma**2), 1 / math.sqrt(1 + sigma_next**2)
        x0 = latents / alpha - sigma * noise_prediction
        h = self._log_snr(i + 1) - self._log_snr(i)
        data = x0
        if self._before is not None and self._before[0] == i - 1 and i < len(self.timesteps) - 1:
            r = (self._log_snr(i) - self._log_snr(i - 1)) / h
            data = x0 + (x0 - self._before[1]) / (2 * r)
        self._before = (i, x0)
        shrink = sigma_next * alpha_next / (sigma * alpha)
        return shrink * latents - alpha_next * math.expm1(-h) * data


Sampler = DDIM | DDPM | DPMPP2M
SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "dpmpp_2m": DPMPP2M}


def make_sampler(name: str, schedule: NoiseSchedule, steps: int) -> Sampler:
    """Make the sampler of that name (`SAMPLERS`).

    Raises ValueError for an unknown name and for a number of steps that the schedule cannot give, TypeError
    for steps that are not a whole number. Warns if the first timestep is far from pure noise, which happens
    because "leading" spacing rounds its stride down to a whole number.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {name!r}")
    sampler = SAMPLERS[name](schedule, whole_number("steps", steps))
    first, n = sampler.timesteps[0], schedule.config.train_timesteps
    if first < 0.9 * n * (1 - 1 / steps):
        warnings.warn(
            f"{steps} steps with {schedule.config.timestep_spacing} spacing start at timestep {first} of {n},"
            " short of pure noise: take another number of steps, or trailing spacing",
            stacklevel=4,  # the line that calls `generate`, which has a decorator
        )
    return sampler


def row_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise `(len(generators), *shape)` on the CPU, each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
