"""The prompts for Stable Diffusion 1.5: enough, each once, disjoint, varied, and none is cut."""

import json
import re

import pytest
from transformers import CLIPTokenizer

from sdcomp.files import ROOT
from sdcomp.model.config import SD15
from sdcomp.model.tokenizer import load_tokenizer

SIZES = {"test": 256, "calibration": 128}


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[str]]:
    """The prompts of both sets."""
    found = {}
    for name in SIZES:
        lines = (ROOT / "data" / "prompts" / f"sd15_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(row.keys() == {"prompt"} for row in rows)
        found[name] = [row["prompt"] for row in rows]
    return found


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """CLIP's."""
    return load_tokenizer(ROOT / "data" / "clip_tokenizer", SD15)


def words(prompt: str) -> set[str]:
    return set(re.findall(r"\w+", prompt.lower())) - {"a", "an", "the", "of", "on", "in", "with", "and", "at"}


def test_both_sets_have_their_size(prompts):
    assert {name: len(texts) for name, texts in prompts.items()} == SIZES


def test_no_prompt_is_there_twice_nor_in_other_words(prompts):
    texts = [*prompts["test"], *prompts["calibration"]]
    assert all(text == " ".join(text.split()) and text for text in texts)
    known = [words(text) for text in texts]
    for i, one in enumerate(known):
        for j, other in enumerate(known[:i]):
            assert len(one & other) < 0.6 * len(one | other), (texts[i], texts[j])


def test_no_prompt_is_cut(prompts, tokenizer):
    for texts in prompts.values():
        assert max(len(ids) for ids in tokenizer(texts, truncation=False).input_ids) <= 77


def test_both_sets_have_many_subjects_counts_colours_and_styles(prompts):
    for texts in prompts.values():
        used = set().union(*map(words, texts))
        assert len(used) > 2 * len(texts)
        assert len(used & {"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}) >= 4
        colours = "red blue green yellow orange purple pink white black brown grey silver gold golden violet"
        assert len(used & set(colours.split())) >= 9
        styles = "photograph watercolour watercolor oil pencil sketch charcoal ink woodcut drawing painting"
        assert len(used & set(styles.split())) >= 5
