"""CLIP as a judge: embeddings of images and texts, by the model's own CLIP or another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from sdcomp.errors import UserError
from sdcomp.evaluation.image_files import center_crop
from sdcomp.files import resolve_input
from sdcomp.model import StableDiffusion
from sdcomp.model.clip import clip_pixels
from sdcomp.model.tokenizer import tokenize

# Mean and deviation of the pixels of OpenAI's CLIP (Radford et al. 2021, published code).
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A CLIP with its preprocessing.

    `pixels` makes images `(N, 3, H, W)` in [0, 1] the image encoder's input, `ids` makes texts token ids.
    """

    model: CLIPModel
    pixels: Callable[[Tensor], Tensor]
    ids: Callable[[list[str]], Tensor]

    @classmethod
    def of(cls, sd: StableDiffusion) -> Clip:
        """The CLIP of a model. Raises ValueError for a model without an image encoder."""
        if sd.clip is None:
            raise ValueError("this model has no CLIP image encoder, so it has no CLIP score")
        return cls(sd.clip, clip_pixels, lambda texts: tokenize(sd.tokenizer, texts))

    @classmethod
    def load(cls, path: str, device: str = "cpu") -> Clip:
        """Load another CLIP from a folder or by a hub name. Raises UserError if that fails."""
        place = resolve_input(path)
        source = str(place) if place.exists() else path
        try:
            model = CLIPModel.from_pretrained(source).eval().to(device)
            tokenizer = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"clip_model={path!r} cannot be loaded as a CLIP: {reason}") from None
        side = model.config.vision_config.image_size

        def pixels(images: Tensor) -> Tensor:
            mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
            return (center_crop(images, side) - mean) / std

        return cls(model, pixels, lambda texts: tokenize(tokenizer, texts))

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Images `(N, 3, H, W)` in [0, 1] -> embeddings `(N, d)` float32 on the CPU.

        Raises ValueError for images that are not floating point, since bytes have another range.
        """
        if not images.is_floating_point():
            raise ValueError("images must be floating point in [0, 1]")
        found = []
        for batch in images.split(batch_size):
            # Resize the images one by one: 128 images of 512x512 take more memory than the network.
            pixels = torch.cat([self.pixels(image.float()) for image in batch.split(1)])
            pixels = pixels.to(self.model.device, self.model.dtype)
            found.append(self.model.get_image_features(pixels).pooler_output.float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def embed_texts(self, texts: list[str], batch_size: int = 128) -> Tensor:
        """Texts -> embeddings `(N, d)` float32 on the CPU."""
        found = []
        for start in range(0, len(texts), batch_size):
            ids = self.ids(texts[start : start + batch_size]).to(self.model.device)
            found.append(self.model.get_text_features(ids).pooler_output.float().cpu())
        return torch.cat(found)
