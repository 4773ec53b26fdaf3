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
from sdcomp.model.batch_size import default_batch_size, rows_at_once
from sdcomp.model.clip import encode_text
from sdcomp.model.config import ModelConfig
from sdcomp.model.generate_arguments import Request, check_request, image_pixels
from sdcomp.model.guidance import guided_call
from sdcomp.model.offloading import weights_on
from sdcomp.model.prompt_warnings import check_prompts
from sdcomp.model.samplers import SAMPLER, STEPS, Sampler, make_sampler
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.seeds import image_generators, row_noise
from sdcomp.model.tokenizer import tokenize
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.scenes import VOCABULARY

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from sdcomp.scenes.reader import SceneReader


@dataclass
class Trace:
    """The sampling path of N images over S steps, float32 on the CPU.

    `timesteps`: `(S,)` int64; `latents`: `(S, N, C, h, w)`, the inputs of the UNet; `noise_predictions`:
    `(S, N, C, h, w)`, after guidance.
    """

    timesteps: Tensor
    latents: Tensor
    noise_predictions: Tensor


@dataclass(eq=False)
class StableDiffusion:
    """A latent diffusion model, ready to generate.

    `unet` may be any module that is called as `unet(latents, timesteps, context)`. `clip` (text and image
    encoder together) and `reader` (the judge of scenes) are None for models that do not have them.
    `offloaded_to` is the device given to `offload`, else None.
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
        """The device that computes: the one given to `offload`, else the one that holds the weights."""
        return self.offloaded_to or next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the VAE decoder's weights."""
        return next(self.decoder.parameters()).dtype

    @property
    def batch_size(self) -> int:
        """The default `batch_size` of `generate` for images of the model's own size."""
        return default_batch_size(image_pixels(self.config, None))

    @property
    def _wide(self) -> torch.dtype:
        """The type of latents: at least float32, since rounding errors add up over the steps."""
        return torch.promote_types(self.dtype, torch.float32)

    def to(self, *args: torch.device | torch.dtype | str) -> StableDiffusion:
        """Move or convert every part, as `nn.Module.to` does, and end offloading; return the model itself."""
        self.offloaded_to = None
        for part in (self.unet, self.encoder, self.decoder, self.text_encoder, self.clip, self.reader):
            if part is not None:
                part.to(*args)
        if self.reader is not None:
            self.reader.float()  # it judges images: its answers must not depend on the model's type
        return self

    def offload(self, device: torch.device | str) -> StableDiffusion:
        """Compute on a `device` that is too small for the whole model; return the model itself.

        The weights stay where they are. Each part's weights are copied to `device` only while it runs.
        """
        self.offloaded_to = torch.device(device)
        return self

    def _ready(self, part: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which `part` computes on `self.device`, in the fastest memory format.

        Convolutions are faster with channels-last weights. `load` only maps the weights from their file,
        which takes no time and no memory; the first use converts them, once. On a CPU the UNet keeps its
        mapped weights: channels-last is no faster there, since attention needs the pixels last.
        """
        as_in_the_file = part is self.unet and self.device.type == "cpu"
        layout = torch.contiguous_format if as_in_the_file else torch.channels_last
        four = (p for p in part.parameters() if p.dim() == 4)
        if not all(p.is_contiguous(memory_format=layout) for p in four):
            with torch.inference_mode(False):  # the weights must stay normal tensors, to be trainable
                part.to(memory_format=layout)
        return nullcontext() if self.offloaded_to is None else weights_on(part, self.offloaded_to)

    def replace(self, **parts: object) -> StableDiffusion:
        """Return the same model with other parts, e.g. `sd.replace(unet=pruned)`; the rest is shared.

        Raises TypeError for an unknown part.
        """
        unknown = sorted(set(parts) - set(self.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"a model has no part {unknown[0]!r}; it has {', '.join(self.__dataclass_fields__)}"
            )
        return dataclasses.replace(self, **parts)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts -> states of the text encoder `(B, L, context_dim)`, in the model's type on its device.

        Each text is encoded alone, so its states do not depend on the other texts.
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
        """Images `(B, 3, H, W)` in [0, 1] -> scaled latents `(B, 4, h, w)`.

        With `generators`, one for each image, latents are drawn from the encoder's posterior; without,
        they are its mean.
        """
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

        Raises NonFiniteError if the decoder gives infinite values or NaN.
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
        steps: int = STEPS,
        sampler: str = SAMPLER,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        image: Tensor | None = None,
        strength: float = 0.8,
        size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        pad: bool = True,
        progress: bool = False,
        trace: bool = False,
    ) -> Tensor | tuple[Tensor, Trace]:
        """Generate one image for each prompt: `(N, 3, H, W)` float32 in [0, 1], on the CPU.

        `guidance_scale` (Ho & Salimans 2021) is the model's own by default; 1 switches guidance off. With
        `image` `(N or 1, 3, H, W)` in [0, 1] it is image-to-image (Meng et al. 2022): only the last steps
        run, a share of `strength` of all steps, and they start from the noised image. `size` is (height,
        width) in pixels. `trace=True` also returns a `Trace`.

        Each image has its own random generator. A single `seed` is combined with each prompt and the
        number of its earlier occurrences; a sequence gives one seed for each prompt. Every batch has
        `batch_size` rows, the last one is padded, so an image does not depend on the other prompts. The
        default is 16 up to 128x128 pixels, and less for larger images, down to 1 at 512x512. `pad=False`
        leaves the last batch smaller, for those who observe the UNet: to them, padding is prompts again.

        Raises ValueError for values out of range, TypeError for values of another type, and NonFiniteError
        if a step gives infinite values or NaN. Warns of prompts that are cut or hold unknown words.
        """
        asked = check_request(
            self.config, prompts, negative_prompt=negative_prompt, steps=steps,
            guidance_scale=guidance_scale, seed=seed, image=image, strength=strength, size=size,
            batch_size=batch_size, pad=pad,
        )  # fmt: skip
        solver = make_sampler(sampler, self.schedule, steps)
        check_prompts(self.tokenizer, asked.prompts + asked.negatives, VOCABULARY if self.reader else None)
        empty = torch.empty(steps - asked.first, 0, *asked.shape)
        images, paths = [torch.empty(0, 3, *asked.pixels)], [(empty, empty)]  # without prompts, no images
        batches = asked.batches()
        total = len(batches) * (steps - asked.first)
        with tqdm(total=total, desc="generate", disable=not progress) as bar:
            for rows in batches:
                kept = rows[-1] - rows[0] + 1  # the rows after these are padding
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
        """Generate one batch; append each step's latents and noise prediction to `path`, if given."""
        generators = image_generators([asked.seeds[r] for r in rows])
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
        # Checked once, after all steps: reading a value waits for the device.
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
        """Pure noise, or the given image with the noise of the timestep."""
        if asked.image is None:
            return row_noise(generators, asked.shape).to(self.device, self._wide)
        source = self.encode_images(asked.image[[r % len(asked.image) for r in rows]], generators)
        noise = row_noise(generators, tuple(source.shape[1:])).to(source)
        return self.schedule.add_noise(source, noise, torch.full((len(rows),), timestep, device=self.device))

    @torch.no_grad()
    def predict_noise(self, latents: Tensor, timestep: int, context: Tensor, scale: float) -> Tensor:
        """The guided noise prediction for latents `(B, 4, h, w)`, by one call of the UNet.

        `context` `(2 B, L, context_dim)` holds the states of the negative prompts, then those of the
        prompts; for a guidance `scale` of 1 only the prompts' `(B, L, context_dim)`. The UNet computes in
        the model's type; the prediction has the type of the latents.
        """

        def predicted(rows: Tensor) -> Tensor:
            return self.unet(rows.to(self.dtype), timestep, context).to(latents.dtype)

        with self._ready(self.unet):
            return guided_call(predicted, latents, scale)
