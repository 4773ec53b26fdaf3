"""The denoising UNet of Stable Diffusion 1.x, with its original submodule names.

Source of truth: `ldm/modules/diffusionmodules/openaimodel.py` and `ldm/modules/attention.py` of the
SD 1.x code. The names (`time_embed`, `input_blocks.N.M`, ...) are those of the published checkpoints, so
these load strictly once their prefix is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdcomp.model.attention import CrossAttention
from sdcomp.model.config import UNetConfig
from sdcomp.model.layers import GroupNorm, Linear, SiLU, Upsample, gelu, is_recorded
from sdcomp.model.prune_groups import PruneGroup


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps `(B,)` -> `(B, dim)` float32, first cosines (Ho et al. 2020)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Residual block: maps `(B, in, h, w)`, time embedding `(B or 1, emb)` -> `(B, out, h, w)`."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, in_channels), SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(SiLU(), Linear(emb_channels, out_channels))
        # The checkpoints count a dropout layer, which SD 1.x sets to 0, as out_layers.2.
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels),
            SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class GEGLU(nn.Module):
    """Gated linear unit (Shazeer 2020): the projection's first half times GELU of its second half."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward network, `(B, N, dim)` -> `(B, N, dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a norm, in a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, `(B, C, h, w)` -> `(B, C, h, w)`."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, (h, w)))


class Downsample(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Stage(nn.Sequential):
    """One numbered block: calls its layers in turn, each with the inputs that it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise in `latents`.

    `forward(latents, timesteps, context)`: `(B, in_channels, h, w)`, `(B,)` or a scalar (training
    timesteps, 0 to 999), `(B, L, context_dim)` -> `(B, out_channels, h, w)`. `h` and `w` must be
    divisible by `2 ** (levels - 1)`. At `SD15.unet` it has 859,520,964 parameters. A ControlNet (Zhang et al.
    2023) gives `down_residuals`, one for each input block, and `mid_residual`, all of these blocks' shapes.

    A timestep that all rows share is embedded once, because a matrix product may round each row in another
    way: equal rows stay equal. With `recompute` set to True, the backward pass computes each stage again
    instead of keeping its activations (Chen et al. 2016). Raises ValueError for a number of timesteps that
    does not fit the rows, or of residuals that does not fit the blocks.
    """

    recompute = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c, groups = config.model_channels, config.norm_groups
        emb = 4 * c
        widths = [c * m for m in config.channel_mult]

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(
                channels, config.context_dim, config.num_heads, config.transformer_depth, groups
            )

        self.time_embed = nn.Sequential(Linear(c, emb), SiLU(), Linear(emb, emb))

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, c, 3, padding=1))])
        channels, skips = c, [c]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, width, emb, groups)]
                if level in config.attention_levels:
                    layers.append(transformer(width))
                self.input_blocks.append(Stage(*layers))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Stage(
            ResBlock(channels, channels, emb, groups),
            transformer(channels),
            ResBlock(channels, channels, emb, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), width, emb, groups)]
                if level in config.attention_levels:
                    layers.append(transformer(width))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(*layers))
                channels = width

        self.out = nn.Sequential(
            GroupNorm(groups, c), SiLU(), nn.Conv2d(c, config.out_channels, 3, padding=1)
        )

    def shortcut_splits(self) -> dict[str, int]:
        """The layers after a skip concatenation: name -> channels of the deeper half, which comes first."""
        splits = {}
        widths = [self.config.model_channels * m for m in reversed(self.config.channel_mult)]
        channels = widths[0]
        for i, stage in enumerate(self.output_blocks):
            if isinstance(stage[0], ResBlock):  # a removed block has its shortcut only
                splits[f"output_blocks.{i}.0.in_layers.2"] = channels
            if isinstance(stage[0].skip_connection, nn.Conv2d):
                splits[f"output_blocks.{i}.0.skip_connection"] = channels
            channels = widths[i // (self.config.num_res_blocks + 1)]
        return splits

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float,
        context: Tensor,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        emb = self._embed(timesteps, latents)
        h, skips = latents, []
        for stage in self.input_blocks:
            h = self._run(stage, h, emb, context)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context)
        if down_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        if mid_residual is not None:
            h = h + mid_residual
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)

    def _embed(self, timesteps: Tensor | float, latents: Tensor) -> Tensor:
        """The time embedding: `(1, emb)` if all rows share a timestep, else `(B, emb)`."""
        timesteps = torch.as_tensor(timesteps, device=latents.device).reshape(-1)
        # len() would make the batch size of a recorded call a constant.
        if len(timesteps) not in (1, latents.shape[0]):
            raise ValueError(f"{len(timesteps)} timesteps for {len(latents)} rows: give one, or one for each")
        # Compared on a CPU only: on other devices the comparison would wait for the device.
        if len(timesteps) > 1 and timesteps.device.type == "cpu" and not is_recorded():
            timesteps = timesteps[:1] if bool((timesteps == timesteps[0]).all()) else timesteps
        emb = timestep_embedding(timesteps, self.config.model_channels)
        return self.time_embed(emb.to(latents.dtype))

    def _run(self, stage: Stage, *args: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)

    def prune_groups(self) -> list[PruneGroup]:
        """The groups that can shrink without changing a residual connection, in the order of the modules."""
        groups = []
        for name, block in self.named_modules():
            if isinstance(block, ResBlock):
                # Units are whole groups of the second norm, so the other groups are normalized as before.
                units, rows = block.out_layers[0].num_groups, ("in_layers.2", "emb_layers.1", "out_layers.0")
                counters = ("out_layers.0.num_groups",)
                shortcut = "skip_connection"
                groups.append(
                    PruneGroup(name, "residual", units, rows, "out_layers.3", 1, counters, shortcut)
                )
            elif isinstance(block, SpatialTransformer):
                groups.append(PruneGroup(name, "transformer", 1, (), "proj_out", shortcut=""))
            elif isinstance(block, CrossAttention):
                rows = ("to_q", "to_k", "to_v")
                groups.append(
                    PruneGroup(name, "attention", block.heads, rows, "to_out.0", counters=("heads",))
                )
            elif isinstance(block, FeedForward):
                units = block.net[2].in_features
                groups.append(PruneGroup(name, "feed-forward", units, ("net.0.proj",), "net.2", repeats=2))
        return groups
