"""Our networks and samplers in diffusers, and our weights under diffusers' names."""

import torch
from torch import nn

from sdcomp.model.config import UNetConfig, VAEConfig
from sdcomp.model.files.names import unet_name, vae_name

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusers_unet(diffusers, config: UNetConfig, sample_size: int = 16) -> nn.Module:
    """`UNet2DConditionModel` of the same architecture, with its own random weights."""
    levels = range(len(config.channel_mult))
    down = tuple("CrossAttnDownBlock2D" if i in config.attention_levels else "DownBlock2D" for i in levels)
    up = tuple(
        "CrossAttnUpBlock2D" if i in config.attention_levels else "UpBlock2D" for i in reversed(levels)
    )
    return diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(config.model_channels * m for m in config.channel_mult),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.num_res_blocks,
        transformer_layers_per_block=config.transformer_depth,
        attention_head_dim=config.num_heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
        use_linear_projection=False,
        flip_sin_to_cos=True,
        freq_shift=0,
    ).eval()


def diffusers_vae(diffusers, config: VAEConfig) -> nn.Module:
    """`AutoencoderKL` of the same architecture, with its own random weights."""
    levels = len(config.channel_mult)
    return diffusers.AutoencoderKL(
        block_out_channels=tuple(config.base_channels * m for m in config.channel_mult),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.latent_scale,
    ).eval()


def diffusers_scheduler(diffusers, name: str, spacing: str, steps: int | None = None):
    """diffusers' scheduler for the name of our sampler, with the settings of SD 1.x."""
    settings = {**BETAS, "steps_offset": 1, "timestep_spacing": spacing}
    if name == "ddpm":
        made = diffusers.DDPMScheduler(**settings, variance_type="fixed_small", clip_sample=False)
    elif name == "ddim":
        made = diffusers.DDIMScheduler(**settings, set_alpha_to_one=False, clip_sample=False)
    else:
        made = diffusers.DPMSolverMultistepScheduler(
            **settings, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
            lower_order_final=True, final_sigmas_type="zero",
        )  # fmt: skip
    if steps is not None:
        made.set_timesteps(steps)
    return made


def unet_state(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Our UNet's weights under diffusers' names."""
    return {unet_name(name, unet.config): value for name, value in unet.state_dict().items()}


def vae_state(encoder: nn.Module, decoder: nn.Module) -> dict[str, torch.Tensor]:
    """Our encoder's and decoder's weights under diffusers' names; its attention has linear layers."""
    state = {}
    for part in (encoder, decoder):
        for name, value in part.state_dict().items():
            theirs = vae_name(name, part.config)
            state[theirs] = value.flatten(1) if ".attentions." in theirs and value.dim() == 4 else value
    return state
