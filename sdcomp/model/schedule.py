"""The noise schedule of the forward process (Ho et al. 2020, equation 4), with the values of SD 1.x."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sdcomp.model.config import ScheduleConfig


class NoiseSchedule:
    """Signal and noise levels by training timestep.

    `alphas_cumprod`: float32 `(train_timesteps,)`, the share of signal variance at each timestep.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - root**2, dim=0)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio at the timesteps: signal variance divided by noise variance."""
        a = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return a / (1 - a)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add the noise of timesteps `(B,)` to latents `(B, ...)` (Ho et al. 2020, equation 4).

        The result has the type of `latents`. The coefficients are float32, because half precision loses
        1 - a.
        """
        a = self.alphas_cumprod.to(latents.device)[timesteps]
        a = a.reshape(-1, *[1] * (latents.dim() - 1))
        return (a.sqrt() * latents + (1 - a).sqrt() * noise).to(latents.dtype)

    def spaced(self, steps: int, *, intervals: int | None = None) -> list[int]:
        """The `steps` training timesteps that a sampler visits, in decreasing order.

        "leading" divides the schedule into `intervals` (default: `steps`), takes the starts of the last
        `steps` of them, and adds 1, as SD 1.x does. "trailing" counts down from the last timestep (Lin et
        al. 2024, table 2). Raises ValueError for a number of steps that the schedule cannot give.
        """
        n, leading = self.config.train_timesteps, self.config.timestep_spacing == "leading"
        limit = n // 2 if leading else n
        if not 1 <= steps <= limit:
            raise ValueError(f"steps must be 1 to {limit}, not {steps}")
        if leading:
            intervals = intervals or steps
            return ((np.arange(intervals - steps, intervals) * (n // intervals))[::-1] + 1).tolist()
        return (np.round(np.arange(n, 0, -n / steps))[:steps].astype(np.int64) - 1).tolist()
