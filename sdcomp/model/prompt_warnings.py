"""Warnings of prompts that a model cannot read whole."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

from transformers import CLIPTokenizer

_CALLER = 4
"""Warnings name the line that calls `generate`: above `check_prompts` are `generate` and its decorator."""


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
