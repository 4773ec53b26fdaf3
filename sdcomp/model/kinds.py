"""Arguments that are easily confused: a whole model and its UNet, a plain UNet and a quantized one."""

from __future__ import annotations

from torch import nn

from sdcomp.model.pipeline import StableDiffusion


def require_model(sd: object) -> None:
    """Raise TypeError for what is no whole model, such as its UNet."""
    require_kind(sd, StableDiffusion, "give the whole model, as sdcomp.load returns it")


def require_module(module: object) -> None:
    """Raise TypeError for what is no module, such as a whole model."""
    require_kind(module, nn.Module, "give the model's UNet, sd.unet, or another module")


def require_kind(value: object, kind: type | tuple[type, ...], needed: str) -> None:
    """Raise TypeError for a value of another kind; `needed` says what to give."""
    if not isinstance(value, kind):
        raise TypeError(f"{needed}, not {type(value).__name__}")
