"""Our UNets inside diffusers' pipelines, and diffusers' UNets as ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sdcomp.model.config import SD15, ModelConfig
from sdcomp.model.files.checkpoint import ModelError, Part, check, one_line
from sdcomp.model.files.diffusers_config import unet_config, unet_settings
from sdcomp.model.files.names import unet_name
from sdcomp.model.unet import UNet


class DiffusersUNet(nn.Module):
    """A module called as `unet(latents, timesteps, context)`, in the form of `UNet2DConditionModel`.

    `forward(sample, timestep, encoder_hidden_states)` returns an object with the prediction as `.sample`,
    or a tuple if `return_dict` is False. Inputs that SD 1.x does not have must be left None.
    """

    def __init__(self, unet: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.unet = unet
        settings = unet_settings(config.unet, config.image_size // config.vae.downsampling)
        self.config = SimpleNamespace(**settings, time_cond_proj_dim=None)

    @property
    def device(self) -> torch.device:
        """Where the first of its weights is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first of its floating-point weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None and value != {}:
                raise ValueError(f"this UNet takes no {name}")
        noise = self.unet(sample, timestep, encoder_hidden_states)
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


def as_diffusers_unet(unet: nn.Module, config: ModelConfig = SD15) -> DiffusersUNet:
    """Our UNet, quantized or pruned maybe, as diffusers' pipelines take it: for `pipe.unet`.

    `unet` is any module called as `unet(latents, timesteps, context)`; weights are shared. `config` tells
    the pipeline the number of channels and the size of images.
    """
    return DiffusersUNet(unet, config)


def from_diffusers_unet(model: nn.Module) -> UNet:
    """Our UNet with the weights of a `UNet2DConditionModel`, shared, not copied.

    Raises ModelError for one that is not of SD 1.x's architecture.
    """
    try:
        config = unet_config(dict(model.config))
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"this UNet is not of Stable Diffusion 1.x's architecture: {one_line(error)}"
        ) from None
    with torch.device("meta"):
        unet = UNet(config)
    ours = {unet_name(name, config): name for name in unet.state_dict()}
    state = {ours.get(name, name): tensor for name, tensor in model.state_dict().items()}
    part = Part(Path("the UNet"), state, "its configuration")
    check(unet, part)
    unet.load_state_dict(part.state, assign=True)
    return unet.train(model.training)
