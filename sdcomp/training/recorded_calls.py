"""What a UNet is given and what it predicts while it generates: the data of recovery."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sdcomp.model import StableDiffusion

Call = tuple[Tensor, int, Tensor, Tensor]
"""Latents, timestep, context and prediction of one call."""


class _Recorder(nn.Module):
    """A UNet that records its calls: latents, timestep, context, prediction, all on the CPU."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.calls: list[Call] = []
        self._context: tuple[Tensor, Tensor] | None = None

    def forward(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        predicted = self.unet(latents, timestep, context)
        # All steps of a batch share one context: keep it once.
        if self._context is None or self._context[0] is not context:
            self._context = context, context.float().cpu()
        self.calls.append((latents.float().cpu(), timestep, self._context[1], predicted.float().cpu()))
        return predicted


class _NoImages(nn.Module):
    """Replaces the decoder where nobody needs the images: returns gray ones, at no cost."""

    def __init__(self, decoder: nn.Module, downsampling: int) -> None:
        super().__init__()
        self.decoder, self.downsampling = decoder, downsampling  # its weights tell the device and the type

    def forward(self, latents: Tensor) -> Tensor:
        height, width = (side * self.downsampling for side in latents.shape[2:])
        return latents.new_zeros(len(latents), 3, 1, 1).expand(-1, -1, height, width)


def recorded_calls(sd: StableDiffusion, prompts: list[str], **settings: Any) -> list[Call]:
    """Generate, and return the calls of the UNet. `settings` are arguments of `StableDiffusion.generate`."""
    recorder = _Recorder(sd.unet)
    decoder = _NoImages(sd.decoder, sd.config.vae.downsampling)
    sd.replace(unet=recorder, decoder=decoder).generate(prompts, pad=False, **settings)
    return recorder.calls
