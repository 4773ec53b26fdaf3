"""CLIP's text encoder and tokenizer: transformers' classes, built from our configuration."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdcomp.files import write_text
from sdcomp.model.config import ModelConfig

_CALLER = 4
"""Warnings name the line that calls `generate`: above `check_prompts` are `generate` and its decorator."""


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


def load_tokenizer(folder: str | Path, config: ModelConfig) -> CLIPTokenizer:
    """Load the tokenizer from `vocab.json` and `merges.txt`, or from `tokenizer.json`, in `folder`.

    Raises FileNotFoundError for a missing file, and ValueError if the two files do not belong together or
    the vocabulary has not as many tokens as the text encoder.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists():
        # transformers 5 saves nothing else.
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    else:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    made = {"".join(pair) for pair in merges}
    lost = [t for t in vocab if len(t.removesuffix("</w>")) > 1 and t not in made and not t.startswith("<|")]
    if lost:
        raise ValueError(
            f"no merge makes the token {lost[0]!r}, and {len(lost) - 1} more; copy both files again"
        )
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=merges, model_max_length=config.text["max_position_embeddings"]
    )
    if len(tokenizer) != config.text["vocab_size"]:
        raise ValueError(
            f"{folder} has a vocabulary of {len(tokenizer)} tokens, but the text encoder knows "
            f"{config.text['vocab_size']}; give the tokenizer that belongs to the model"
        )
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`, which `load_tokenizer` reads."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"].items(), key=lambda item: item[1])
    write_text(folder / "vocab.json", json.dumps(dict(vocab), ensure_ascii=False))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    write_text(folder / "merges.txt", "#version: 0.2\n" + merges)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids `(B, L)` of prompts, cut or padded to the text encoder's length L, as in SD 1.x."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def check_prompts(tokenizer: CLIPTokenizer, prompts: list[str], known: Collection[str] | None = None) -> None:
    """Warn of prompts that are too long for the text encoder, and of words that are not `known`.

    Raises ValueError for text that cannot be encoded, such as half of a surrogate pair.
    """
    texts = list(dict.fromkeys(prompts))
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text[:60]!r} is no valid text ({error.reason}); write it again") from None
    ids = tokenizer(texts, truncation=False, verbose=False).input_ids if texts else []
    limit = tokenizer.model_max_length
    if long := [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) > limit]:
        warnings.warn(
            f"{len(long)} of {len(texts)} prompts are cut: the text encoder reads {limit - 2} tokens, and"
            f" {long[0][:60]!r}... is longer",
            stacklevel=_CALLER,
        )
    if known is not None:
        words = {word for text in texts for word in re.findall(r"\w+", text.lower())}
        if strange := sorted(words - set(known)):
            warnings.warn(
                f"this model never learnt {', '.join(map(repr, strange[:5]))}: it knows only the words of its"
                " captions, see sdcomp.scenes.VOCABULARY",
                stacklevel=_CALLER,
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
