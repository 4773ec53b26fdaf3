"""Configurations of the latent diffusion model's parts, as dataclasses.

`SD15` and `TINY` are two instances of the same classes; the tiny model has no special cases. An instance
checks its values when it is made, before any module is built, and raises UserError for a wrong one. The
limits are far above the values of any real model, and low enough that a wrong file costs little time and
memory.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sdcomp.errors import UserError
from sdcomp.settings import (
    FLAG,
    ListOf,
    Number,
    OneOf,
    Rule,
    Whole,
    check_names,
    check_settings,
    shown,
    within,
)

_WIDTH = Whole(1, 65_536)
_COUNT = Whole(1, 256)
_MULTIPLIERS = ListOf(Whole(1, 64), 1, 8)
_BLOCKS = 500
"""Transformer blocks of a UNet: SD 1.x has 16, SDXL 70. Building this many takes a second."""
_LEAST_SIGNAL = 1e-8
"""The least share of signal variance at the last timestep (SD 1.x: 0.0047). Samplers divide by its root."""


@dataclass(frozen=True)
class UNetConfig:
    """The denoising UNet (Rombach et al. 2022, section 3; `openaimodel.UNetModel` in the SD 1.x code).

    Level `i` has `model_channels * channel_mult[i]` channels and half the resolution of level `i - 1`;
    the levels in `attention_levels`, and the middle block, have transformer blocks.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: int = 8
    transformer_depth: int = 1
    context_dim: int = 768
    norm_groups: int = 32

    def __post_init__(self) -> None:
        check_settings(vars(self), _UNET)
        widths = [self.model_channels * m for m in self.channel_mult]
        last = len(widths) - 1
        if self.model_channels % 2:
            raise UserError(f"model_channels is {self.model_channels}, but must be even")
        if self.channel_mult[0] != 1:
            raise UserError(f"channel_mult is {shown(self.channel_mult)}, but must begin with 1")
        if not all(level <= last for level in self.attention_levels):
            raise UserError(
                f"attention_levels is {shown(self.attention_levels)}, but channel_mult has levels 0 to {last}"
            )
        _divides("norm_groups", self.norm_groups, widths)
        # The middle block has attention too.
        _divides("num_heads", self.num_heads, [widths[i] for i in {*self.attention_levels, last}])
        blocks = self.transformer_depth * (
            1 + len(set(self.attention_levels)) * (2 * self.num_res_blocks + 1)
        )
        if blocks > _BLOCKS:
            raise UserError(
                f"transformer_depth is {self.transformer_depth}, which makes {blocks} transformer blocks; "
                f"there must be at most {_BLOCKS}"
            )


_UNET: dict[str, Rule] = {
    "in_channels": _COUNT, "out_channels": _COUNT, "model_channels": _WIDTH, "channel_mult": _MULTIPLIERS,
    "num_res_blocks": Whole(1, 16), "attention_levels": ListOf(Whole(0, 7), 0, 8),
    "num_heads": Whole(1, 1024), "transformer_depth": Whole(1, 64), "context_dim": _WIDTH,
    "norm_groups": Whole(1, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder with a KL penalty (`AutoencoderKL` in the SD 1.x code).

    Images are `(B, 3, H, W)` in [-1, 1]; latents are `(B, z_channels, H / f, W / f)` with
    `f = 2 ** (len(channel_mult) - 1)`, multiplied by `latent_scale` before they reach the UNet.
    """

    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    norm_groups: int = 32
    latent_scale: float = 0.18215

    def __post_init__(self) -> None:
        check_settings(vars(self), _VAE)
        widths = [self.base_channels * m for m in self.channel_mult]
        _divides("norm_groups", self.norm_groups, [self.base_channels, *widths])

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


_VAE: dict[str, Rule] = {
    "base_channels": _WIDTH, "channel_mult": _MULTIPLIERS, "num_res_blocks": Whole(1, 16),
    "z_channels": _COUNT, "norm_groups": Whole(1, 4096), "latent_scale": Number(1e-4, 1e4),
}  # fmt: skip


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: variances linear in the square root ("scaled linear"), SD 1.x's values.

    `timestep_spacing` says which training timesteps a sampler visits: "leading" as in SD 1.x, or
    "trailing", which starts at the last one (Lin et al. 2024, table 2).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_timesteps: int = 1000
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        check_settings(vars(self), _SCHEDULE)
        if not self.beta_start < self.beta_end:
            raise UserError(f"beta_end is {self.beta_end}, but must be above beta_start, {self.beta_start}")
        if self._signal() < _LEAST_SIGNAL:
            raise UserError(
                f"beta_end is {self.beta_end}, but must be smaller: after {self.train_timesteps} timesteps "
                "nothing of the image is left"
            )

    def _signal(self) -> float:
        """The share of signal variance at the last timestep (Ho et al. 2020, equation 4)."""
        first, last = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        step = (last - first) / (self.train_timesteps - 1)
        return math.exp(sum(math.log1p(-((first + i * step) ** 2)) for i in range(self.train_timesteps)))


_SCHEDULE: dict[str, Rule] = {
    "beta_start": Number(1e-9, 0.999), "beta_end": Number(1e-9, 0.999),
    "train_timesteps": Whole(2, 100_000), "timestep_spacing": OneOf("leading", "trailing"),
}  # fmt: skip


def _clip_text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, **changes,
    }  # fmt: skip


_CLIP: dict[str, Rule] = {
    "hidden_size": Whole(1, 16_384), "intermediate_size": _WIDTH, "num_hidden_layers": Whole(1, 200),
    "num_attention_heads": Whole(1, 1024),
    "hidden_act": OneOf("quick_gelu", "gelu", "gelu_new", "relu", "silu"),
}  # fmt: skip
_TEXT: dict[str, Rule] = {
    "vocab_size": Whole(1, 1_000_000), "max_position_embeddings": Whole(2, 4096), **_CLIP,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), Whole(0, 1_000_000)),
}  # fmt: skip
_VISION: dict[str, Rule] = {"image_size": Whole(1, 4096), "patch_size": Whole(1, 4096), **_CLIP}


def check_text(settings: dict[str, Any]) -> None:
    """Raise UserError unless `settings` describe a text encoder that can be built."""
    check_settings(settings, _TEXT)
    _divides("num_attention_heads", settings["num_attention_heads"], [settings["hidden_size"]])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings[name] >= (size := settings["vocab_size"]):
            raise UserError(f"{name} is {settings[name]}, but must be below vocab_size, {size}")


def _check_vision(settings: dict[str, Any]) -> None:
    check_settings(settings, _VISION)
    _divides("num_attention_heads", settings["num_attention_heads"], [settings["hidden_size"]])
    if settings["patch_size"] > (size := settings["image_size"]):
        raise UserError(f"patch_size is {settings['patch_size']}, but must be at most image_size, {size}")


def _divides(name: str, value: int, widths: list[int]) -> None:
    for width in widths:
        if width % value:
            raise UserError(f"{name} is {value}, but must divide the width {width}")


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model.

    `text` holds the keyword arguments of transformers' `CLIPTextConfig`, `vision` those of
    `CLIPVisionConfig`; `vision` is None for a model without an image encoder, such as SD 1.x.
    `projection_dim` is the dimension of CLIP's shared space. `image_size` is the side of the square
    training images, in pixels. `guidance_scale` is the default of `generate`. `reader` says whether the
    model has a scene reader.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: dict[str, Any] = field(default_factory=_clip_text)
    vision: dict[str, Any] | None = None
    projection_dim: int = 768
    image_size: int = 512
    guidance_scale: float = 7.5
    reader: bool = False

    def __post_init__(self) -> None:
        for name, part in _PARTS.items():
            if not isinstance(getattr(self, name), part):
                raise UserError(f"{name} is {shown(getattr(self, name))}, but must be a {part.__name__}")
        check_settings({name: getattr(self, name) for name in _MODEL}, _MODEL)
        with within("text"):
            check_text(self.text)
        if self.vision is not None:
            with within("vision"):
                _check_vision(self.vision)
        factor = self.vae.downsampling * 2 ** (len(self.unet.channel_mult) - 1)
        if self.image_size % factor:
            raise UserError(f"image_size is {self.image_size}, but must be a multiple of {factor}")
        unet, z = self.unet, self.vae.z_channels
        if unet.context_dim != (width := self.text["hidden_size"]):
            raise UserError(f"unet: context_dim is {unet.context_dim}, but text has a hidden_size of {width}")
        if (channels := (unet.in_channels, unet.out_channels)) != (z, z):
            raise UserError(f"unet: in_channels, out_channels are {channels}, but vae has z_channels of {z}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain containers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises UserError for an unknown name and for a value that breaks a rule.
        """
        values = dict(values)
        for name, part in _PARTS.items():
            if name in values:
                with within(name):
                    values[name] = from_dict(part, values[name])
        return from_dict(cls, values)


_PARTS: dict[str, type] = {"unet": UNetConfig, "vae": VAEConfig, "schedule": ScheduleConfig}
_MODEL: dict[str, Rule] = {
    "projection_dim": _WIDTH,
    "image_size": Whole(1, 4096),
    "guidance_scale": Number(0, 100),
    "reader": FLAG,
}


def from_dict(cls: type, values: object) -> Any:
    """Make an instance of a configuration class from plain containers, as JSON gives them.

    Raises UserError for an unknown name and for a value that the class refuses.
    """
    check_names(values, {f.name for f in dataclasses.fields(cls)})
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


SD15 = ModelConfig()

TINY = ModelConfig(
    unet=UNetConfig(
        model_channels=48, channel_mult=(1, 2, 4), num_res_blocks=1, attention_levels=(1, 2),
        num_heads=4, context_dim=128, norm_groups=16,
    ),
    vae=VAEConfig(
        base_channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8, latent_scale=1.0,
    ),
    schedule=ScheduleConfig(timestep_spacing="trailing"),
    text=_clip_text(
        vocab_size=627, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=625, eos_token_id=626, pad_token_id=626,
    ),
    vision={
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8, "hidden_act": "quick_gelu",
    },
    projection_dim=128, image_size=64, guidance_scale=4.0, reader=True,
)  # fmt: skip
