"""The tokenizer of the tiny model: a byte-level BPE made for the words of its captions."""

from __future__ import annotations

from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from sdcomp.model import ModelConfig
from sdcomp.scenes import VOCABULARY


def caption_tokenizer(config: ModelConfig) -> CLIPTokenizer:
    """Make a CLIP tokenizer with one token for every caption word; it can encode any other text too."""
    vocab, merges = word_tokenizer(VOCABULARY)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.text["max_position_embeddings"])


def word_tokenizer(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Make a byte-level BPE (Sennrich et al. 2016) in which each of `words` is one token.

    Returns the vocabulary and the merges as CLIP's files have them: the 256 bytes, the 256 bytes at a
    word's end, the merges, and last the start and end tokens. Any text can be encoded.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(p) > 1 for p in pieces):
        counts: dict[tuple[str, str], int] = {}
        for p in pieces:
            for pair in pairwise(p):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        pieces = [_merge(p, best) for p in pieces]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for token in piece:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out
