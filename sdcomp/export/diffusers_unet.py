"""Use our UNets in diffusers' pipelines, and diffusers' UNets as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sdcomp.model.config import SD15, ModelConfig
from sdcomp.model.files.diffusers_config import unet_config, unet_settings
from sdcomp.model.files.names import unet_name
from sdcomp.model.files.tensors import ModelError, Part, check, one_line
from sdcomp.model.kinds import require_module
from sdcomp.model.unet import UNet


class DiffusersUNet(nn.Module):
    """Gives a module that is called as `unet(latents, timesteps, context)` diffusers' interface.

    The interface is that of `UNet2DConditionModel`: `forward(sample, timestep, encoder_hidden_states)`
    returns an object with the prediction as `.sample`, or a tuple if `return_dict` is False. It also takes
    the residuals of a ControlNet. Raises ValueError for inputs that SD 1.x does not have, unless they are
    None.
    """

    def __init__(self, unet: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.unet = unet
        settings = unet_settings(config.unet, config.image_size // config.vae.downsampling)
        self.config = SimpleNamespace(**settings, time_cond_proj_dim=None)

    @property
    def device(self) -> torch.device:
        """The device of the first weight."""
        return next(self._tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point weight; float32 for an exported UNet, which has none."""
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.float32)

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self.parameters(), self.buffers())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None and value != {}:
                raise ValueError(f"this UNet takes no {name}")
        down, mid = down_block_additional_residuals, mid_block_additional_residual
        if (down is None) != (mid is None):
            raise ValueError("a ControlNet gives residuals of the down blocks and the mid block: give both")
        residuals = () if down is None else (down, mid)  # not every module takes them
        noise = self.unet(sample, timestep, encoder_hidden_states, *residuals)
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


def as_diffusers_unet(unet: nn.Module, config: ModelConfig = SD15) -> DiffusersUNet:
    """Wrap our UNet for a pipeline of diffusers, to be assigned to `pipe.unet`.

    `unet` is any module that is called as `unet(latents, timesteps, context)`, so it may be quantized, pruned
    or loaded from an export. The weights are shared. `config` tells the pipeline the number of channels and
    the image size. Raises TypeError for what cannot be called, such as a whole model.
    """
    if not callable(unet):
        require_module(unet)
    return DiffusersUNet(unet, config)


def from_diffusers_unet(model: nn.Module) -> UNet:
    """Make our UNet from a `UNet2DConditionModel`; the weights are shared, not copied.

    Raises ModelError if the model does not have SD 1.x's architecture, and TypeError for what is no model of
    diffusers.
    """
    if not isinstance(getattr(model, "config", None), Mapping):
        raise TypeError(f"from_diffusers_unet takes a UNet2DConditionModel, not {type(model).__name__}")
    try:
        config = unet_config(dict(model.config))
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"this UNet does not have Stable Diffusion 1.x's architecture: {one_line(error)}"
        ) from None
    with torch.device("meta"):
        unet = UNet(config)
    ours = {unet_name(name, config): name for name in unet.state_dict()}
    state = {ours.get(name, name): tensor for name, tensor in model.state_dict().items()}
    part = Part(Path("the UNet"), state, "its configuration")
    check(unet, part)
    unet.load_state_dict(part.state, assign=True)
    return unet.train(model.training)
