"""Convert between our configurations and those of diffusers and transformers.

We write every setting that shapes a part. A configuration that we read must equal the one that we would
write for it, so that no setting of another architecture is overlooked.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import CLIPTextConfig

from sdcomp.errors import UserError
from sdcomp.model.config import SD15, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig, check_text
from sdcomp.model.files.unsupported import WANTED_FOLDER, refuse_unet_settings
from sdcomp.settings import AnyOf, ListOf, OneOf, Text, Whole, check_settings, shown

# Settings that change nothing in SD 1.x's computation.
_FREE = {"sample_size", "upcast_attention", "addition_embed_type_num_heads", "force_upcast"}
# Rules for settings that are used before one of our configurations checks them.
_WIDTHS, _KINDS = ListOf(Whole(1, 65_536), 1, 8), ListOf(Text(), 1, 8)
_SPACING = OneOf("leading", "trailing", "linspace")


def unet_settings(config: UNetConfig, sample_size: int = 64) -> dict[str, Any]:
    """The settings of `UNet2DConditionModel` for our UNet."""
    attention = [level in config.attention_levels for level in range(len(config.channel_mult))]
    return {
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.model_channels * m for m in config.channel_mult],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "layers_per_block": config.num_res_blocks,
        "transformer_layers_per_block": config.transformer_depth,
        "attention_head_dim": config.num_heads,  # diffusers' historical name for the number of heads
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
    }


def vae_settings(config: VAEConfig, sample_size: int = 512) -> dict[str, Any]:
    """The settings of `AutoencoderKL` for our encoder and decoder."""
    levels = len(config.channel_mult)
    return {
        "sample_size": sample_size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [config.base_channels * m for m in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.norm_groups,
        "act_fn": "silu",
        "scaling_factor": config.latent_scale,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }


def schedule_settings(config: ScheduleConfig) -> dict[str, Any]:
    """The settings of diffusers' schedulers for our noise schedule, with `DDIMScheduler`'s own."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": config.train_timesteps,
        "prediction_type": "epsilon",
        "timestep_spacing": config.timestep_spacing,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }


def unet_config(values: dict[str, Any]) -> UNetConfig:
    """Our configuration for the settings of `UNet2DConditionModel`; UserError for another architecture."""
    lists = {name: values[name] for name in ("block_out_channels", "down_block_types")}
    check_settings(lists, {"block_out_channels": _WIDTHS, "down_block_types": _KINDS})
    widths, heads = list(values["block_out_channels"]), values["attention_head_dim"]
    heads = set(heads) if isinstance(heads, list | tuple) else {heads}
    refuse_unet_settings(values["cross_attention_dim"], heads)
    config = UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        attention_levels=tuple(i for i, kind in enumerate(values["down_block_types"]) if "CrossAttn" in kind),
        num_heads=heads.pop(),
        transformer_depth=values.get("transformer_layers_per_block", 1),
        context_dim=values["cross_attention_dim"],
        norm_groups=values.get("norm_num_groups", 32),
    )
    _compare(values, {**unet_settings(config), "attention_head_dim": values["attention_head_dim"]})
    return config


def vae_config(values: dict[str, Any]) -> VAEConfig:
    """Our configuration for the settings of `AutoencoderKL`; UserError for another architecture."""
    check_settings({"block_out_channels": values["block_out_channels"]}, {"block_out_channels": _WIDTHS})
    widths = list(values["block_out_channels"])
    config = VAEConfig(
        base_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        z_channels=values["latent_channels"],
        norm_groups=values.get("norm_num_groups", 32),
        latent_scale=values.get("scaling_factor", SD15.vae.latent_scale),
    )
    _compare(values, vae_settings(config))
    return config


def latent_size(values: dict[str, Any]) -> int:
    """The side of a `UNet2DConditionModel`'s training latents, in latent pixels; UserError if invalid."""
    size = values.get("sample_size")
    check_settings({"sample_size": size}, {"sample_size": AnyOf(OneOf(None), Whole(1, 4096))})
    return size or 64


def _compare(values: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise UserError for the first setting that differs from ours; unknown settings may be off or unset."""
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        if (
            name.startswith("_")
            or name in _FREE
            or value == ours.get(name)
            or (name not in ours and not value)
        ):
            continue
        wanted = f"not {ours[name]!r}" if name in ours else "which Stable Diffusion 1.x does not have"
        raise UserError(f"{name} is {shown(value)}, {wanted}{WANTED_FOLDER}")


def schedule_config(values: dict[str, Any]) -> ScheduleConfig:
    """Our noise schedule for the settings of a scheduler; UserError for another kind of schedule."""
    check_settings(
        {"timestep_spacing": values.get("timestep_spacing", "leading")}, {"timestep_spacing": _SPACING}
    )
    if values.get("timestep_spacing") == "linspace":
        warnings.warn(
            "the scheduler's timestep_spacing is 'linspace', which the samplers here do not have: they visit"
            " the timesteps of 'leading', so images differ a little from those of diffusers",
            stacklevel=2,
        )
    config = ScheduleConfig(
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        train_timesteps=values.get("num_train_timesteps", 1000),
        timestep_spacing="trailing" if values.get("timestep_spacing") == "trailing" else "leading",
    )
    ours = schedule_settings(config) | {"trained_betas": None, "rescale_betas_zero_snr": False}
    fixed = ("beta_schedule", "prediction_type", "trained_betas", "rescale_betas_zero_snr")
    _compare({name: values[name] for name in fixed if name in values}, ours)
    return config


def text_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of transformers' `CLIPTextModel`."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "layer_norm_eps": 1e-5,
        "projection_dim": config.projection_dim,
        **config.text,
    }


def text_config(values: dict[str, Any]) -> dict[str, Any]:
    """Our configuration for the settings of `CLIPTextConfig`; UserError for another text encoder."""
    full = CLIPTextConfig(**{k: v for k, v in values.items() if not k.startswith("_")})
    if full.layer_norm_eps != 1e-5:
        raise UserError(f"layer_norm_eps is {shown(full.layer_norm_eps)}, not 1e-05{WANTED_FOLDER}")
    check_settings({"vocab_size": full.vocab_size}, {"vocab_size": Whole(2, 1_000_000)})
    # The published file has other ids of special tokens; they matter only to the pooled output.
    last = full.vocab_size - 1
    ids = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    settings = {name: getattr(full, name) for name in SD15.text} | ids
    check_text(settings)
    return settings
