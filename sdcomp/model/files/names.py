"""Map original Stable Diffusion parameter names, which are used here, to diffusers' names."""

from __future__ import annotations

import re

from sdcomp.model.config import UNetConfig, VAEConfig

# Applied one after the other, each wherever it matches. `unet_name` renames the numbered blocks before.
_UNET = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)
_VAE = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.", ".down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
# The VAE's attention had other names in diffusers before 0.17; many files still have them.
_OLD_VAE = (
    (r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.", lambda m: f".to_{m[1] or m[2] or m[3]}."),
    (r"\.proj_attn\.", ".to_out.0."),
)


def _apply(rules: tuple, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_name(name: str, config: UNetConfig) -> str:
    """Our UNet's parameter name -> the name in diffusers' `UNet2DConditionModel`."""
    block = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(op\.|conv\.)?", name)
    if block and block[0] != "input_blocks.0.0.":
        down = block[1] == "input"
        # The original counts all blocks in one sequence; diffusers counts levels, and layers in a level.
        level, i = divmod(int(block[2]) - down, config.num_res_blocks + 1)
        if block[4]:
            kind = "downsamplers.0.conv" if down else "upsamplers.0.conv"
        else:
            kind = f"{'resnets' if block[3] == '0' else 'attentions'}.{i}"
        name = f"{'down' if down else 'up'}_blocks.{level}.{kind}.{name[block.end() :]}"
    return _apply(_UNET, name)


def vae_name(name: str, config: VAEConfig) -> str:
    """Our encoder's or decoder's parameter name -> the name in diffusers' `AutoencoderKL`."""
    last = len(config.channel_mult) - 1
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", name)
    return _apply(_VAE, name)


def modern_vae_name(name: str) -> str:
    """An old or new parameter name of `AutoencoderKL` -> the new one."""
    return _apply(_OLD_VAE, name)
