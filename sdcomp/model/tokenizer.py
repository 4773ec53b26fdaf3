"""CLIP's tokenizer: transformers' class, read from files of any version."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from sdcomp.files import write_text
from sdcomp.model.config import ModelConfig


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
            f"{config.text['vocab_size']}; give the tokenizer that belongs to the model. Tokens that were"
            " added to it, as for textual inversion, are not supported"
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
