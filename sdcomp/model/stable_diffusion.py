"""The latent diffusion pipeline: prompts (and images) to images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcomp.model.config import ModelConfig
from sdcomp.model.offloading import weights_on
from sdcomp.model.samplers import make_sampler, row_noise, whole
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.text import encode_text, tokenize
from sdcomp.model.vae import VAEDecoder, VAEEncoder

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from sdcomp.scenes.reader import SceneReader


@dataclass
class Trace:
    """What happened along the sampling path: S steps, N images.

    `timesteps`: `(S,)` int64; `latents`: `(S, N, C, h, w)`, the UNet's inputs; `noise_predictions`: of the
    same shape, after guidance.
    """

    timesteps: Tensor
    latents: Tensor
    noise_predictions: Tensor


@dataclass(eq=False)
class StableDiffusion:
    """A latent diffusion model, ready to generate.

    `unet` may be any module that is called as `unet(latents, timesteps, context)`. `clip` (text and image
    encoder together) and `reader` are there for models that bring them, else None. `offloaded_to` is the
    device that `offload` names.
    """

    config: ModelConfig
    unet: nn.Module
    encoder: VAEEncoder
    decoder: VAEDecoder
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    clip: CLIPModel | None = None
    reader: SceneReader | None = None
    offloaded_to: torch.device | None = None

    def __post_init__(self) -> None:
        self.schedule = NoiseSchedule(self.config.schedule)

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its weights are, or where `offload` lends them."""
        return self.offloaded_to or next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the VAE decoder's weights."""
        return next(self.decoder.parameters()).dtype

    @property
    def batch_size(self) -> int:
        """Images of the model's own size that `generate` takes at a time by default."""
        return _rows(16, self._pixels(None))

    def to(self, *args: torch.device | torch.dtype | str) -> StableDiffusion:
        """Move every part, as `nn.Module.to`, and end offloading; returns the model itself."""
        self.offloaded_to = None
        for part in (self.unet, self.encoder, self.decoder, self.text_encoder, self.clip, self.reader):
            if part is not None:
                part.to(*args)
        if self.reader is not None:
            self.reader.float()  # it judges; its answers must not depend on the type of what is judged
        return self

    def offload(self, device: torch.device | str) -> StableDiffusion:
        """Compute on `device`, for those on which the whole model does not fit; returns the model itself.

        The weights stay where they are, and each part's are copied to `device` only while it is used.
        """
        self.offloaded_to = torch.device(device)
        return self

    def _ready(self, part: nn.Module) -> AbstractContextManager[object]:
        """A context in which `part` computes on `self.device`, as fast as it can.

        Convolutions run faster if their weights have the channels last. `load` leaves them as they are in
        the file, mapped, which takes no time and no memory; here they are laid out once. On a CPU the UNet
        gains nothing by it, since its attention wants the pixels last, and keeps its mapped weights.
        """
        as_in_the_file = part is self.unet and self.device.type == "cpu"
        layout = torch.contiguous_format if as_in_the_file else torch.channels_last
        four = (p for p in part.parameters() if p.dim() == 4)
        if not all(p.is_contiguous(memory_format=layout) for p in four):
            with torch.inference_mode(False):  # or they could not be trained any more
                part.to(memory_format=layout)
        return nullcontext() if self.offloaded_to is None else weights_on(part, self.offloaded_to)

    def replace(self, **parts: object) -> StableDiffusion:
        """The same model with other parts, e.g. `sd.replace(unet=pruned)`; the rest is shared.

        Raises TypeError for a part that it does not have.
        """
        unknown = sorted(set(parts) - set(self.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"a model has no part {unknown[0]!r}; it has {', '.join(self.__dataclass_fields__)}"
            )
        return dataclasses.replace(self, **parts)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, format: str | None = None) -> Path:
        """Write the model so that `sdcomp.load` reads it; weights are converted to `dtype` if given.

        `format` is "sdcomp" (a folder, with everything), "original" (one file in Stable Diffusion's own
        layout; the default for a path ending in `.safetensors`) or "diffusers" (a folder for
        `StableDiffusionPipeline.from_pretrained`). See `sdcomp.model.save`.
        """
        from sdcomp.model.loading import save

        return save(self, path, dtype, format)

    @torch.inference_mode()
    def encode_images(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> scaled latents `(B, 4, h, w)`; their mean without generators."""
        pixels = 2 * images.to(self.device, self.dtype) - 1
        with self._ready(self.encoder):
            parts = [self.encoder(some) for some in pixels.split(_rows(len(pixels), pixels.shape[2:]))]
        mean, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
        if generators is not None:
            noise = row_noise(generators, tuple(mean.shape[1:])).to(mean)
            mean = mean + (0.5 * logvar).exp() * noise
        return self.config.vae.latent_scale * mean

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, 4, h, w)` -> images `(B, 3, H, W)` float32 in [0, 1]."""
        latents = latents.to(self.device, self.dtype) / self.config.vae.latent_scale
        f = self.config.vae.downsampling
        rows = _rows(len(latents), (latents.shape[2] * f, latents.shape[3] * f))
        with self._ready(self.decoder):
            images = torch.cat([self.decoder(some) for some in latents.split(rows)])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 20,
        sampler: str = "ddim",
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        image: Tensor | None = None,
        strength: float = 0.8,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        trace: bool = False,
    ) -> Tensor | tuple[Tensor, Trace]:
        """Generate one image for each prompt: `(N, 3, H, W)` float32 in [0, 1], on the CPU.

        `guidance_scale` (Ho & Salimans 2021) is the model's own by default; 1 switches guidance off.
        `image` `(N or 1, 3, H, W)` in [0, 1] makes it image-to-image (Meng et al. 2022): the last
        `strength` (0 to 1) of the steps run, from the noised image. `size` is (height, width) in pixels.
        `trace=True` also returns a `Trace`.

        Each image has its own generator. With one `seed` for all, it is seeded by the seed, the prompt
        and how often that prompt came before; with a sequence, by the number given. All batches run at
        `batch_size` rows, the last one padded, so an image does not depend on what stands beside it. By
        default these are 16 up to 128x128 pixels and fewer for larger images, down to 1 at 512x512.

        Raises ValueError for values out of range and TypeError for values of another type.
        """
        prompts = _as_texts("prompts", prompts)
        negatives = _as_texts("negative_prompt", negative_prompt)
        n = len(prompts)
        if len(negatives) not in (1, n):
            raise ValueError(f"{len(negatives)} negative prompts for {n} prompts: give one, or one for each")
        if batch_size is not None and whole("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        scale = self.config.guidance_scale if guidance_scale is None else float(guidance_scale)
        if not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        if image is not None:
            image = self._check_image(image, n, size)
            size = image.shape[2:]
        shape = self._latent_shape(size)
        batch_size = batch_size or _rows(16, self._pixels(size))
        solver = make_sampler(sampler, self.schedule, steps)
        first = 0 if image is None else steps - max(1, min(int(steps * strength), steps))
        seeds = _row_seeds(seed, prompts)

        # What no prompts give.
        images = [torch.empty(0, 3, *self._pixels(size))]
        traces = [(torch.empty(steps - first, 0, *shape),) * 2]
        bar = tqdm(total=-(-n // batch_size) * (steps - first), desc="generate", disable=not progress)
        for start in range(0, n, batch_size):
            # Padding repeats the last row.
            rows = [min(start + i, n - 1) for i in range(batch_size)]
            kept = min(batch_size, n - start)
            generators = [torch.Generator().manual_seed(seeds[r]) for r in rows]
            texts = [prompts[r] for r in rows]
            if scale != 1:
                texts = [negatives[r % len(negatives)] for r in rows] + texts
            with self._ready(self.text_encoder):
                context = encode_text(self.text_encoder, tokenize(self.tokenizer, texts).to(self.device))
            context = context.to(self.dtype)
            if image is None:
                latents = row_noise(generators, shape).to(self.device, self.dtype)
            else:
                source = self.encode_images(image[[r % len(image) for r in rows]], generators)
                noise = row_noise(generators, tuple(source.shape[1:])).to(source)
                latents = self.schedule.add_noise(
                    source, noise, torch.full((batch_size,), solver.timesteps[first], device=self.device)
                )
            path = []
            with self._ready(self.unet):  # for all steps at once
                for i in range(first, steps):
                    predicted = self.predict_noise(latents, solver.timesteps[i], context, scale)
                    if trace:
                        path.append((latents[:kept].float().cpu(), predicted[:kept].float().cpu()))
                    noise = None
                    if solver.stochastic:
                        noise = row_noise(generators, tuple(latents.shape[1:])).to(latents)
                    latents = solver.step(i, latents, predicted, noise)
                    bar.update()
            images.append(self.decode_latents(latents)[:kept].cpu())
            if trace:
                traces.append(tuple(torch.stack(parts) for parts in zip(*path, strict=True)))
        bar.close()
        result = torch.cat(images)
        if not trace:
            return result
        latents, predictions = (torch.cat(parts, dim=1) for parts in zip(*traces, strict=True))
        return result, Trace(torch.tensor(solver.timesteps[first:]), latents, predictions)

    @torch.inference_mode()
    def predict_noise(self, latents: Tensor, timestep: int, context: Tensor, scale: float) -> Tensor:
        """The guided noise prediction for latents `(B, 4, h, w)`: both halves in one call of the UNet.

        `context` `(2 B, L, context_dim)` holds the negative prompts' states, then the prompts'; for a
        guidance `scale` of 1 only the latter, `(B, L, context_dim)`.
        """
        both = latents if scale == 1 else torch.cat([latents, latents])
        timesteps = torch.full((len(both),), timestep, device=self.device)
        with self._ready(self.unet):
            predicted = self.unet(both, timesteps, context)
        if scale == 1:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + scale * (positive - negative)

    def _pixels(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.config.image_size, self.config.image_size
        if not isinstance(size, Sequence) or len(size) != 2:
            raise TypeError(f"size must be (height, width), not {size!r}")
        return whole("size", size[0]), whole("size", size[1])

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        height, width = self._pixels(size)
        factor = self.config.vae.downsampling * 2 ** (len(self.config.unet.channel_mult) - 1)
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {height} and {width}")
        f = self.config.vae.downsampling
        return self.config.unet.in_channels, height // f, width // f

    def _check_image(self, image: Tensor, n: int, size: tuple[int, int] | None) -> Tensor:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise TypeError("image must be a floating-point tensor with values in [0, 1]")
        image = image[None] if image.dim() == 3 else image
        if image.dim() != 4 or image.shape[1] != 3 or len(image) not in (1, n):
            raise ValueError(f"image must be (1 or {n}, 3, H, W), not {tuple(image.shape)}")
        # Written so that nan is refused too.
        if not ((image >= 0) & (image <= 1)).all():
            raise ValueError("image must have values in [0, 1]")
        if size is not None and tuple(size) != tuple(image.shape[2:]):
            raise ValueError("size and image disagree: leave size out, or resize the image first")
        self._latent_shape(tuple(image.shape[2:]))
        return image


def _rows(n: int, pixels: Sequence[int]) -> int:
    """How many of `n` images to take at a time, so that memory stays that of one at 512x512.

    Divides `n`: all go through kernels of the same batch size, on which bits depend.
    """
    most = max(1, 512 * 512 // (pixels[0] * pixels[1]))
    return max(rows for rows in range(1, n + 1) if n % rows == 0 and rows <= most) if n else 1


def _as_texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be text or a list of texts")
    return texts


def _row_seeds(seed: int | Sequence[int], prompts: list[str]) -> list[int]:
    if isinstance(seed, Iterable) and not isinstance(seed, str):
        seeds = [whole("seed", s) for s in seed]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one for each")
        for s in seeds:
            if not 0 <= s < 2**64:
                raise ValueError(f"a seed of an image must be at least 0 and below 2**64, not {s}")
        return seeds
    seed = whole("seed", seed)
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed}\0{seen[prompt]}\0{prompt}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
        seen[prompt] += 1
    return seeds
