"""The latent diffusion pipeline: prompts (and images) to images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcomp.errors import NonFiniteError
from sdcomp.model.config import ModelConfig
from sdcomp.model.offloading import weights_on
from sdcomp.model.requests import Request, check_request, image_pixels, rows_at_once
from sdcomp.model.samplers import Sampler, make_sampler, row_noise
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.text import check_prompts, encode_text, tokenize
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.scenes import VOCABULARY

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
        return rows_at_once(16, image_pixels(self.config, None))

    @property
    def _wide(self) -> torch.dtype:
        """The type of latents: at least float32, since errors of half precision add up along the steps."""
        return torch.promote_types(self.dtype, torch.float32)

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
            with torch.inference_mode(False):  # weights stay normal tensors, which can be trained
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

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts -> the text encoder's states `(B, L, context_dim)`, in the model's type on its device.

        Each text is encoded by itself, so its states do not depend on the others.
        """
        states: dict[str, Tensor] = {}
        with self._ready(self.text_encoder):
            for prompt in prompts:
                if prompt not in states:
                    ids = tokenize(self.tokenizer, [prompt]).to(self.device)
                    states[prompt] = encode_text(self.text_encoder, ids).to(self.dtype)
        return torch.cat([states[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode_images(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] -> scaled latents `(B, 4, h, w)`; their mean without generators."""
        pixels = 2 * images.to(self.device, self.dtype) - 1
        with self._ready(self.encoder):
            parts = [self.encoder(some) for some in pixels.split(rows_at_once(len(pixels), pixels.shape[2:]))]
        mean, logvar = (torch.cat(part).to(self._wide) for part in zip(*parts, strict=True))
        if generators is not None:
            noise = row_noise(generators, tuple(mean.shape[1:])).to(mean)
            deviation = torch.cat([(0.5 * image).exp() for image in logvar.split(1)])
            mean = mean + deviation * noise
        return self.config.vae.latent_scale * mean

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents `(B, 4, h, w)` -> images `(B, 3, H, W)` float32 in [0, 1].

        Raises NonFiniteError where the decoder gives infinite values or NaN.
        """
        latents = (latents.to(self.device, self._wide) / self.config.vae.latent_scale).to(self.dtype)
        f = self.config.vae.downsampling
        rows = rows_at_once(len(latents), (latents.shape[2] * f, latents.shape[3] * f))
        with self._ready(self.decoder):
            images = torch.cat([self.decoder(some) for some in latents.split(rows)]).float()
        if not images.isfinite().all():
            raise NonFiniteError(
                "the VAE decoder, after the last step, gives values that are not finite: "
                "load the model in float32, or check its weights"
            )
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
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

        Raises ValueError for values out of range, TypeError for values of another type, and NonFiniteError
        when a step gives infinite values or NaN. Warns of prompts that the text encoder cuts.
        """
        asked = check_request(
            self.config, prompts, negative_prompt=negative_prompt, steps=steps, sampler=sampler,
            guidance_scale=guidance_scale, seed=seed, image=image, strength=strength, size=size,
            batch_size=batch_size,
        )  # fmt: skip
        solver = make_sampler(sampler, self.schedule, steps)
        check_prompts(self.tokenizer, asked.prompts + asked.negatives, VOCABULARY if self.reader else None)
        path = torch.empty(steps - asked.first, 0, *asked.shape)
        images, paths = [torch.empty(0, 3, *asked.pixels)], [(path, path)]  # for no prompts
        batches = asked.batches()
        total = len(batches) * (steps - asked.first)
        with tqdm(total=total, desc="generate", disable=not progress) as bar:
            for rows in batches:
                kept = rows[-1] - rows[0] + 1
                path = [] if trace else None
                images.append(self._generate_rows(asked, rows, solver, bar, path)[:kept].cpu())
                if trace:
                    paths.append(tuple(torch.stack(part)[:, :kept] for part in zip(*path, strict=True)))
        if not trace:
            return torch.cat(images)
        latents, predictions = (torch.cat(part, dim=1) for part in zip(*paths, strict=True))
        return torch.cat(images), Trace(torch.tensor(solver.timesteps[asked.first :]), latents, predictions)

    def _generate_rows(
        self, asked: Request, rows: list[int], solver: Sampler, bar: tqdm, path: list | None
    ) -> Tensor:
        """One batch of images; `path` takes the latents and the noise prediction of each step."""
        generators = [torch.Generator().manual_seed(asked.seeds[r]) for r in rows]
        texts = [asked.prompts[r] for r in rows]
        if asked.scale != 1:
            texts = [asked.negatives[r % len(asked.negatives)] for r in rows] + texts
        context = self.encode_prompts(texts)
        latents = self._first_latents(asked, rows, generators, solver.timesteps[asked.first])
        finite = []
        with self._ready(self.unet):  # for all steps at once
            for i in range(asked.first, asked.steps):
                predicted = self.predict_noise(latents, solver.timesteps[i], context, asked.scale)
                if path is not None:
                    path.append((latents.float().cpu(), predicted.float().cpu()))
                noise = row_noise(generators, asked.shape).to(latents) if solver.stochastic else None
                latents = solver.step(i, latents, predicted, noise)
                finite.append(latents.isfinite().all())
                bar.update()
        # Once for all steps: each look at a value waits for the device.
        if not torch.stack(finite).all():
            step = asked.first + torch.stack(finite).tolist().index(False)
            raise NonFiniteError(
                f"step {step + 1} of {asked.steps} (timestep {solver.timesteps[step]}) gives values that are"
                " not finite: use a wider type such as float32, or check the UNet's weights and scales"
            )
        return self.decode_latents(latents)

    def _first_latents(
        self, asked: Request, rows: list[int], generators: list[torch.Generator], timestep: int
    ) -> Tensor:
        """Pure noise, or an image noised to the timestep."""
        if asked.image is None:
            return row_noise(generators, asked.shape).to(self.device, self._wide)
        source = self.encode_images(asked.image[[r % len(asked.image) for r in rows]], generators)
        noise = row_noise(generators, tuple(source.shape[1:])).to(source)
        return self.schedule.add_noise(source, noise, torch.full((len(rows),), timestep, device=self.device))

    @torch.no_grad()
    def predict_noise(self, latents: Tensor, timestep: int, context: Tensor, scale: float) -> Tensor:
        """The guided noise prediction for latents `(B, 4, h, w)`: both halves in one call of the UNet.

        `context` `(2 B, L, context_dim)` holds the negative prompts' states, then the prompts'; for a
        guidance `scale` of 1 only the latter, `(B, L, context_dim)`. The UNet is given the model's type; the
        prediction has the latents'.
        """
        both = latents if scale == 1 else torch.cat([latents, latents])
        with self._ready(self.unet):
            predicted = self.unet(both.to(self.dtype), timestep, context).to(latents.dtype)
        if scale == 1:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + scale * (positive - negative)
