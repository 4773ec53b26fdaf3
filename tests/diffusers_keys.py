"""The same networks and samplers in diffusers, and our weights under diffusers' names."""

import re

import torch
from torch import nn

from sdcomp.model.config import UNetConfig, VAEConfig

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_RULES = (
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"attentions\.0\.norm\.", "attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"attentions\.0\.proj_out\.", "attentions.0.to_out.0."),
    (r"encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
)


def _swap_prefix(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    return name


def unet_name(name: str, config: UNetConfig) -> str:
    """The name in `UNet2DConditionModel` of a parameter of our UNet."""
    per_level = config.num_res_blocks + 1
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if match and (match[1], match[2]) != ("input", "0"):
        side, layer, rest = match[1], match[3], match[4]
        down = side == "input"
        level, i = divmod(int(match[2]) - down, per_level)
        block = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            name = f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        elif rest.startswith("conv."):
            name = f"{block}.upsamplers.0.{rest}"
        else:
            name = f"{block}.{'resnets' if layer == '0' else 'attentions'}.{i}.{rest}"
    name = _swap_prefix(name, _UNET_ENDS)
    match = re.fullmatch(r"(.+\.resnets\.\d+\.)(.+)", name)
    return match[1] + _swap_prefix(match[2], _RESNET) if match else name


def vae_name(name: str, config: VAEConfig) -> str:
    """The name in `AutoencoderKL` of a parameter of our encoder or decoder."""
    last = len(config.channel_mult) - 1
    name = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
    for pattern, replacement in _VAE_RULES:
        name = re.sub(pattern, replacement, name)
    return name


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
    """diffusers' scheduler of our sampler's name, with the settings of SD 1.x."""
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
