"""CLIP's text and image encoders: transformers' classes, built from our configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdcomp.model.config import ModelConfig
from sdcomp.model.tokenizer import tokenize


def build_text_encoder(config: ModelConfig) -> CLIPTextModel:
    """Build the text encoder with random weights."""
    return CLIPTextModel(CLIPTextConfig(**config.text))


def build_clip(config: ModelConfig) -> CLIPModel:
    """Build the whole CLIP, text and image encoder, with random weights.

    Raises ValueError for a model without an image encoder.
    """
    if config.vision is None:
        raise ValueError("this model has no CLIP image encoder: its configuration has no 'vision'")
    return CLIPModel(
        CLIPConfig(text_config=config.text, vision_config=config.vision, projection_dim=config.projection_dim)
    )


def encode_text(text_encoder: nn.Module, ids: Tensor) -> Tensor:
    """Token ids `(B, L)` -> states of the last layer after the final norm `(B, L, hidden)`, as in SD 1.x."""
    return text_encoder(input_ids=ids).last_hidden_state


def text_states(text_encoder: nn.Module, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> states of the text encoder `(B, L, hidden)` on its device, without gradients."""
    device = next(text_encoder.parameters()).device
    with torch.no_grad():
        return encode_text(text_encoder, tokenize(tokenizer, prompts).to(device))


def clip_pixels(images: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] -> the input of the tiny model's CLIP, in [-1, 1]."""
    return 2 * images - 1
