"""Configurations of the latent diffusion model's parts, as dataclasses.

`SD15` and `TINY` are two instances of the same classes: nothing is special-cased for the small one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


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


def _clip_text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, **changes,
    }  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model.

    `text` holds the keyword arguments of transformers' `CLIPTextConfig`; `vision` those of
    `CLIPVisionConfig` where the model brings its image encoder (SD 1.x does not), else None;
    `projection_dim` is the size of CLIP's shared space. `image_size` is the side of the square
    images it was trained on, in pixels; `reader` says that a scene reader comes with it.
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

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain containers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises ValueError for a name that no configuration has.
        """
        values = dict(values)
        parts = {"unet": UNetConfig, "vae": VAEConfig, "schedule": ScheduleConfig}
        for name, part in parts.items():
            if name in values:
                values[name] = _build(part, values[name])
        return _build(cls, values)


def _build(cls: type, values: dict[str, Any]) -> Any:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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
