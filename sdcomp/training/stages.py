"""The four trainings of the tiny model, in order: autoencoder, CLIP, UNet, reader.

Each takes its number of steps, a seed, and maybe the path of a checkpoint to resume from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from sdcomp.model import ModelConfig, NoiseSchedule, UNet, VAEDecoder, VAEEncoder, weights_digest
from sdcomp.model.clip import build_clip
from sdcomp.scenes.reader import SceneReader
from sdcomp.training.data import SceneSet
from sdcomp.training.loop import Trained, fit
from sdcomp.training.losses import clip_loss, diffusion_loss, reader_loss, vae_loss


def train_vae(
    config: ModelConfig, data: SceneSet, steps: int, *, seed: int = 0, device: str = "cpu",
    checkpoint: str | Path | None = None, progress: bool = True,
) -> Trained:  # fmt: skip
    """Train the autoencoder; the trained module is a ModuleDict of "encoder" and "decoder"."""
    torch.manual_seed(seed)
    vae = nn.ModuleDict({"encoder": VAEEncoder(config.vae), "decoder": VAEDecoder(config.vae)})
    vae = vae.to(device, memory_format=torch.channels_last)
    return fit(
        vae, vae_loss(vae, data), steps, lr=2e-3, seed=seed, checkpoint=checkpoint,
        inputs={"scenes": data.digest}, progress=progress, desc="vae",
    )  # fmt: skip


def train_clip(
    config: ModelConfig, tokenizer: CLIPTokenizer, data: SceneSet, steps: int, *, seed: int = 0,
    device: str = "cpu", checkpoint: str | Path | None = None, progress: bool = True,
) -> Trained:  # fmt: skip
    """Train CLIP: the text encoder for the UNet's conditions, and the image encoder for CLIP scores."""
    torch.manual_seed(seed)
    clip = build_clip(config).to(device)
    return fit(
        clip, clip_loss(clip, tokenizer, data), steps, lr=1e-3, weight_decay=0.05, seed=seed,
        checkpoint=checkpoint, inputs={"scenes": data.digest}, progress=progress, desc="clip",
    )  # fmt: skip


@dataclass
class Latents:
    """The encoded training images: scaled means and standard deviations, `(N, 4, h, w)` each.

    The factor `scale` gives the means a standard deviation of 1, as 0.18215 does for SD 1.x (Rombach et al.
    2022, appendix G). `encoder` is the hash of the encoder's weights.
    """

    means: Tensor
    stds: Tensor
    scale: float
    encoder: str


@torch.no_grad()
def encode_scenes(encoder: VAEEncoder, data: SceneSet, progress: bool = True) -> Latents:
    """Encode all training images."""
    device = next(encoder.parameters()).device
    means, stds = [], []
    batches = np.array_split(np.arange(len(data.scenes)), -(-len(data.scenes) // 128))
    for rows in tqdm(batches, desc="encode", disable=not progress):
        mean, logvar = encoder(2 * data.batch(rows).to(device, memory_format=torch.channels_last) - 1)
        means.append(mean.cpu().contiguous())
        stds.append((0.5 * logvar).exp().cpu().contiguous())
    mean, std = torch.cat(means), torch.cat(stds)
    scale = 1 / mean.std().item()
    return Latents(scale * mean, scale * std, scale, weights_digest(encoder))


def train_unet(
    config: ModelConfig, clip: CLIPModel, tokenizer: CLIPTokenizer, data: SceneSet,
    latents: Latents, steps: int, *, start: UNet | None = None, seed: int = 0, device: str = "cpu",
    checkpoint: str | Path | None = None, progress: bool = True,
) -> Trained:  # fmt: skip
    """Train the UNet to predict noise in the scaled latents, given the captions.

    `start` is a UNet of the same configuration; the training continues from its weights. Give another
    `seed` then, so that it does not see the same batches again.
    """
    inputs = {
        "scenes": data.digest, "encoder": latents.encoder, "text encoder": weights_digest(clip.text_model)
    }  # fmt: skip
    torch.manual_seed(seed)
    unet = UNet(config.unet)
    if start is not None:
        unet.load_state_dict(start.state_dict())
        inputs["start"] = weights_digest(start)
    unet = unet.to(device, memory_format=torch.channels_last)
    schedule, spread = NoiseSchedule(config.schedule), (latents.means, latents.stds)
    loss = diffusion_loss(unet, schedule, spread, data, clip.text_model.eval(), tokenizer)
    return fit(
        unet, loss, steps, lr=1e-3, seed=seed, checkpoint=checkpoint, inputs=inputs, progress=progress,
        desc="unet",
    )  # fmt: skip


@torch.no_grad()
def vae_round_trips(vae: nn.ModuleDict, images: Tensor) -> Tensor:
    """Encode images `(N, 3, H, W)` in [0, 1] to the mean and decode them again, on the CPU."""
    device = next(vae.parameters()).device
    out = []
    for batch in images.split(128):
        mean, _ = vae["encoder"](2 * batch.to(device, memory_format=torch.channels_last) - 1)
        out.append((vae["decoder"](mean) / 2 + 0.5).clamp(0, 1).cpu().contiguous())
    return torch.cat(out)


def train_reader(
    vae: nn.ModuleDict, data: SceneSet, steps: int, *, seed: int = 0, device: str = "cpu",
    checkpoint: str | Path | None = None, progress: bool = True,
) -> Trained:  # fmt: skip
    """Train the reader on rendered scenes, and on the first 30 % also after the autoencoder."""
    torch.manual_seed(seed)
    reader = SceneReader().to(device, memory_format=torch.channels_last)
    inputs = {"scenes": data.digest, "autoencoder": weights_digest(vae)}
    n = int(0.3 * len(data.scenes))
    chunks = np.array_split(np.arange(n), -(-n // 1024))
    trips = torch.cat([(vae_round_trips(vae, data.batch(rows)) * 255).round().byte() for rows in chunks])
    return fit(
        reader, reader_loss(reader, data, trips), steps, lr=2e-3, weight_decay=0.02, seed=seed,
        checkpoint=checkpoint, inputs=inputs, progress=progress, desc="reader",
    )  # fmt: skip
