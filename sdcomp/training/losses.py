"""Losses for `sdcomp.training.fit`: of each part of the tiny model, and of recovery."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from sdcomp.model.clip import clip_pixels, text_states
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.tokenizer import tokenize
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.quantization import QuantModel
from sdcomp.scenes import BACKGROUNDS, Scene, caption, render
from sdcomp.scenes.reader import SceneReader, head_targets
from sdcomp.training.data import FAMILY, SceneSet
from sdcomp.training.loop import Loss
from sdcomp.training.recorded_calls import Call


def vae_loss(
    vae: nn.ModuleDict, data: SceneSet, batch: int = 64, crop: int = 32, kl_weight: float = 2e-4
) -> Loss:
    """L1 + 2 MSE on random crops, and a small Kullback-Leibler penalty (Kingma & Welling 2014).

    `vae` holds "encoder" and "decoder". Crops teach the same local code as whole images at a quarter of the
    cost. The penalty is the mean over latent elements.
    """
    encoder: VAEEncoder = vae["encoder"]
    decoder: VAEDecoder = vae["decoder"]
    device = next(vae.parameters()).device

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        images = data.batch(rng.choice(len(data.scenes), batch, replace=False))
        # Multiples of 4: a crop's latent grid then lies on the grid of the whole image.
        top, left = 4 * rng.integers(0, (images.shape[-1] - crop) // 4 + 1, 2)
        images = 2 * images[:, :, top : top + crop, left : left + crop] - 1
        images = images.to(device, memory_format=torch.channels_last)
        mean, logvar = encoder(images)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        error = decoder(mean + (0.5 * logvar).exp() * noise) - images
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return error.abs().mean() + 2 * error.square().mean() + kl_weight * kl.mean()

    return loss


def clip_loss(clip: CLIPModel, tokenizer: CLIPTokenizer, data: SceneSet, families: int = 32) -> Loss:
    """Symmetric contrastive loss (Radford et al. 2021, figure 3) over whole families of scenes.

    The scenes of a family differ in one point, so the model must learn every attribute of every object.
    """
    device = clip.device

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        rows = FAMILY * rng.choice(len(data.scenes) // FAMILY, families, replace=False)
        rows = (rows[:, None] + np.arange(FAMILY)).ravel()
        texts = [caption(data.scenes[r], rng) for r in rows]
        image = clip.get_image_features(clip_pixels(data.batch(rows)).to(device)).pooler_output
        text = clip.get_text_features(tokenize(tokenizer, texts).to(device)).pooler_output
        # CLIP's published bound on the temperature keeps the training stable.
        scale = clip.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        labels = torch.arange(len(rows), device=device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return loss


def diffusion_loss(
    unet: UNet,
    schedule: NoiseSchedule,
    latents: tuple[Tensor, Tensor],
    data: SceneSet,
    text_encoder: nn.Module,
    tokenizer: CLIPTokenizer,
    batch: int = 32,
    drop_text: float = 0.1,
    gamma: float = 5.0,
) -> Loss:
    """Noise prediction (Ho et al. 2020, equation 14) with weights min(SNR, gamma) / SNR (Hang et al. 2023).

    `latents`: scaled means and standard deviations of the encoded training images, each `(N, 4, h, w)`.
    A share `drop_text` of the rows has an empty caption, for guidance (Ho & Salimans 2021).
    """
    means, stds = latents
    device = next(unet.parameters()).device

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        rows = rng.choice(len(data.scenes), batch, replace=False)
        texts = ["" if rng.random() < drop_text else caption(data.scenes[r], rng) for r in rows]
        context = text_states(text_encoder, tokenizer, texts)
        noise = torch.randn(2, batch, *means.shape[1:], generator=generator)
        clean = means[rows] + stds[rows] * noise[0]
        # Stratified timesteps: one draw from each of `batch` equal ranges.
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        t = (t * schedule.config.train_timesteps).long()
        noisy = schedule.add_noise(clean, noise[1], t).to(device, memory_format=torch.channels_last)
        error = (unet(noisy, t.to(device), context) - noise[1].to(device)).square().mean((1, 2, 3))
        snr = schedule.snr(t).to(device)
        return (snr.clamp(max=gamma) / snr * error).mean()

    return loss


def reader_loss(reader: SceneReader, data: SceneSet, round_trips: Tensor, batch: int = 128) -> Loss:
    """Sum of cross-entropies over the reader's heads, on augmented scenes and on images without a scene.

    `round_trips`: `(M, 3, 64, 64)` uint8, the first M images, encoded and decoded by the tiny model's VAE.
    They replace 80 % of the rows that have one. Every row gets random blur, noise and light. One row in
    six shows no scene: noise, an empty background, a blend of two scenes, or the shuffled tiles of one.
    """
    colors = np.random.default_rng(0)
    empty = render([Scene(str(colors.choice(BACKGROUNDS)), ()) for _ in range(512)], 0)
    negatives = batch // 6
    device = next(reader.parameters()).device

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        rows = rng.choice(len(data.scenes), batch, replace=False)
        images = data.batch(rows)
        seen = torch.from_numpy(rows) < len(round_trips)
        seen &= torch.rand(batch, generator=generator) < 0.8
        images[seen] = round_trips[torch.from_numpy(rows)[seen]].float() / 255
        scenes: list[Scene | None] = [data.scenes[r] for r in rows]
        for k in range(negatives):
            images[k] = _nothing(k % 4, images[k], images[-1 - k], empty, rng, generator)
            scenes[k] = None
        soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        blur = torch.rand(batch, 1, 1, 1, generator=generator).mul(3).sub(2).clamp(0, 1)
        noise = torch.rand(batch, 1, 1, 1, generator=generator).mul(0.15).sub(0.075).clamp(0, 1)
        light = 1 + 0.1 * (torch.rand(batch, 3, 1, 1, generator=generator) - 0.5)
        images = images + blur * (soft - images)
        images = images * light + noise * torch.randn(images.shape, generator=generator)
        logits = reader(images.clamp(0, 1).to(device, memory_format=torch.channels_last))
        targets = head_targets(scenes)
        return sum(F.cross_entropy(logits[name], targets[name].to(device)) for name in targets)

    return loss


def _nothing(
    kind: int,
    image: Tensor,
    other: Tensor,
    empty: Tensor,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Make an image without a readable scene, of one of four kinds."""
    if kind == 0:
        mean, spread = torch.rand(3, 1, 1, generator=generator), torch.rand(1, generator=generator)
        return (mean + 0.5 * spread * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    if kind == 1:
        return empty[rng.integers(len(empty))]
    if kind == 2:
        return (image + other) / 2
    tiles = F.unfold(image[None], 16, stride=16)
    order = torch.randperm(tiles.shape[-1], generator=generator)
    return F.fold(tiles[..., order], image.shape[-2:], 16, stride=16)[0]


def recovery_loss(
    student: nn.Module, calls: list[Call], batch_size: int, rows: int, half: bool | None
) -> Loss:
    """The loss of a batch of recorded rows, in parts: its micro-batches' losses add up to its mean."""
    recorded = [(call, i) for call in calls for i in range(len(call[0]))]
    device = next(student.parameters()).device
    half = device.type == "cuda" if half is None else half

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Iterator[Tensor]:
        chosen = [recorded[r] for r in rng.integers(len(recorded), size=batch_size)]
        for some in _micro_batches(student, chosen, rows):
            latents, context, target = (
                torch.stack([call[part][i] for call, i in some]).to(device) for part in (0, 2, 3)
            )
            timesteps = torch.tensor([call[1] for call, _ in some], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                predicted = student(latents, timesteps, context)
            yield F.mse_loss(predicted.float(), target) * (len(some) / batch_size)

    return loss


def _micro_batches(
    student: nn.Module, chosen: list[tuple[Call, int]], rows: int
) -> Iterator[list[tuple[Call, int]]]:
    """Split a batch into micro-batches, each within one timestep interval of a timestep-aware student."""
    groups: dict[int, list[tuple[Call, int]]] = {}
    for call, i in chosen:
        interval = student.interval_of(call[1]) if isinstance(student, QuantModel) else 0
        groups.setdefault(interval, []).append((call, i))
    for group in groups.values():
        for start in range(0, len(group), rows):
            yield group[start : start + rows]
