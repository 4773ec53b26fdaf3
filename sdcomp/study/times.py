"""Times of compressed UNets, each measured in turn with the UNet as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdcomp.evaluation import Estimate, component_times, interleaved_times, median, peak_memory

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion


PARTS = ("text encoder", "UNet", "decoder", "total")
"""The parts of the time of a generation."""


class PairedTimes:
    """Times one UNet at a time beside the model's own, so that only two UNets are in memory.

    Every round runs both, and a ratio is taken within a round. If the machine slows down, both slow down.
    """

    def __init__(self, sd: StableDiffusion, repeats: int, *, images: int, seed: int = 0) -> None:
        """Make the inputs of a call with guidance: 2 x `images` rows, with a context of full length."""
        self.sd, self.repeats = sd, repeats
        generator = torch.Generator().manual_seed(seed)
        rows, side = 2 * images, sd.config.image_size // sd.config.vae.downsampling
        config, length = sd.config.unet, sd.config.text["max_position_embeddings"]
        latents = torch.randn(rows, config.in_channels, side, side, generator=generator)
        context = torch.randn(rows, length, config.context_dim, generator=generator)
        self.inputs: tuple[Tensor, int, Tensor] = (
            latents.to(sd.device, sd.dtype),
            500,
            context.to(sd.device, sd.dtype),
        )

    @torch.no_grad()
    def step(self, unet: nn.Module) -> tuple[Estimate, Estimate]:
        """Seconds of a call of `unet`, and the ratio to a call of the model's own UNet in the same round."""
        calls = {"baseline": lambda: self.sd.unet(*self.inputs), "variant": lambda: unet(*self.inputs)}
        seconds = interleaved_times(calls, self.repeats, device=self.sd.device)
        return median(seconds["variant"]), median(seconds["variant"], seconds["baseline"])

    @torch.no_grad()
    def peak(self, unet: nn.Module) -> int | None:
        """Bytes that a call of `unet` takes beyond the weights on a GPU, None elsewhere.

        A process on a CPU keeps and reuses memory, so only a fresh process could tell.
        """
        if self.sd.device.type != "cuda":
            return None
        return peak_memory(lambda: unet(*self.inputs), self.sd.device)

    def components(
        self, unet: nn.Module, prompts: list[str], **settings: Any
    ) -> tuple[dict[str, Estimate], dict[str, Estimate], Estimate]:
        """Times of `generate(prompts, **settings)` with `unet`, in turn with the model's own UNet.

        First the seconds of each of the `PARTS`. Then the share of each in the same generation's total. Last
        the ratio of the total to that with the model's own UNet in the same round.
        """
        models = {"baseline": self.sd, "variant": self.sd.replace(unet=unet)}
        table = component_times(models, prompts, self.repeats, **settings)
        own, base = (table[table.variant == name] for name in ("variant", "baseline"))
        seconds = {part: own[part].to_numpy() for part in PARTS}
        whole = seconds["total"]
        times = {part: median(values) for part, values in seconds.items()}
        shares = {part: median(values, whole) for part, values in seconds.items() if part != "total"}
        return times, shares, median(whole, base["total"].to_numpy())


def at_steps(call: Estimate, steps: int, of: int) -> Estimate:
    """The ratio of the times of an image with `steps` and one with `of` steps, from the ratio of a call."""
    share = steps / of
    return Estimate(share * call.value, share * call.low, share * call.high, call.n)
