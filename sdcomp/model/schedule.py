"""The noise schedule of the forward process (Ho et al. 2020, equation 4; SD 1.x's values)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sdcomp.model.config import ScheduleConfig


class NoiseSchedule:
    """Signal and noise levels by training timestep.

    `alphas_cumprod`: float32 `(train_timesteps,)`, the share of signal variance left at each timestep.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - root**2, dim=0)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, signal variance over noise variance, at the timesteps."""
        a = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return a / (1 - a)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents `(B, ...)` noised to the timesteps `(B,)` in one go (Ho et al. 2020, equation 4).

        The result has the type of `latents`; the coefficients are float32, since 1 - a is lost in half
        precision.
        """
        a = self.alphas_cumprod.to(latents.device)[timesteps]
        a = a.reshape(-1, *[1] * (latents.dim() - 1))
        return (a.sqrt() * latents + (1 - a).sqrt() * noise).to(latents.dtype)

    def spaced(self, steps: int, spacing: str, *, intervals: int | None = None) -> np.ndarray:
        """The `steps` training timesteps that a sampler visits, last first, int64.

        "leading" divides the timesteps by `intervals` (default: `steps`), takes the last `steps` of them
        and shifts by one, as SD 1.x does; "trailing" counts down from the last timestep (Lin et al. 2024,
        table 2). Raises ValueError for other spacings and for more steps than the schedule can give.
        """
        n = self.config.train_timesteps
        limit = n // 2 if spacing == "leading" else n
        if not 1 <= steps <= limit:
            raise ValueError(f"steps must be 1 to {limit}, not {steps}")
        if spacing == "leading":
            intervals = intervals or steps
            return (np.arange(intervals - steps, intervals) * (n // intervals))[::-1] + 1
        if spacing == "trailing":
            return np.round(np.arange(n, 0, -n / steps))[:steps].astype(np.int64) - 1
        raise ValueError(f"timestep_spacing must be 'leading' or 'trailing', not {spacing!r}")
