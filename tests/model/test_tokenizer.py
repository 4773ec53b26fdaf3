"""CLIP's tokenizer in data/clip_tokenizer gives the token ids of the published one."""

import json
import shutil

import pytest
import torch
from transformers import CLIPTokenizer

from sdcomp.files import resolve_input, sha256
from sdcomp.model import SD15
from sdcomp.model.tokenizer import load_tokenizer, save_tokenizer, tokenize

FOLDER = resolve_input("data/clip_tokenizer")

# Ids from OpenAI's own algorithm (open_clip's SimpleTokenizer with the same merges), with start and end.
IDS = {
    "": [49406, 49407],
    " ": [49406, 49407],
    "a photograph of an astronaut riding a horse": [
        49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407,
    ],
    "Café au lait, naïve façade — Zürich": [
        49406, 15304, 2566, 572, 585, 267, 1097, 35689, 563, 778, 10067, 1928, 2005, 89, 6522, 4021, 49407,
    ],
    "cafe\u0301": [49406, 15304, 49407],
    "a 🐱\u200d👤 in a 🚀!!!": [49406, 320, 35710, 4244, 964, 353, 530, 320, 22400, 995, 49407],
    "don't  STOP\tthe\nmusic's 3.14159 (masterpiece:1.2)": [
        49406, 847, 713, 1691, 518, 1179, 568, 274, 269, 272, 275, 272, 276, 280, 263,
        12066, 281, 272, 269, 273, 264, 49407,
    ],
    "日本の富士山、浮世絵": [
        49406, 39121, 44353, 21575, 161, 107, 234, 161, 96, 104, 46096, 365, 45262, 162, 113, 106, 19759,
        244, 37810, 369, 49407,
    ],
    "a_b-c/d\\e": [49406, 320, 318, 321, 268, 322, 270, 323, 315, 324, 49407],
    "x" * 300: [49406, *[32035] * 74, 22819, 49407],
    "word " * 200: [49406, *[2653] * 75, 49407],
}  # fmt: skip
# OpenAI's code cleans these first (ligatures, HTML); transformers, which SD 1.x was trained with, does not.
UNCLEANED = [
    "ﬁre",
    "&amp; <b> 100% #tag",
    "<|endoftext|> inside",
    "İstanbul ΑΣ",
    "\uff11\uff12 ½ ²",
    "\u200b",
    "\x00",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return load_tokenizer(FOLDER, SD15)


def test_the_files_are_the_published_ones():
    # The checksums of openai/clip-vit-large-patch14 on the hub.
    assert sha256(FOLDER / "vocab.json") == "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"
    assert sha256(FOLDER / "merges.txt") == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


@pytest.mark.parametrize("prompt", IDS, ids=lambda p: repr(p[:20]))
def test_ids_of_awkward_prompts(tokenizer, prompt):
    ids = IDS[prompt]
    assert tokenize(tokenizer, [prompt]).tolist() == [ids + [49407] * (77 - len(ids))]


def test_ids_agree_with_transformers_on_the_published_files(tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / name, tmp_path)
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    prompts = [*IDS, *UNCLEANED]
    expected = theirs(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, prompts), expected)


def test_a_saved_tokenizer_is_loaded_unchanged(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path, SD15)
    prompts = [*IDS, *UNCLEANED]
    assert torch.equal(tokenize(again, prompts), tokenize(tokenizer, prompts))
    # And from the one file that transformers 5 writes.
    tokenizer.save_pretrained(tmp_path / "t5")
    assert not (tmp_path / "t5" / "vocab.json").exists()
    again = load_tokenizer(tmp_path / "t5", SD15)
    assert torch.equal(tokenize(again, prompts), tokenize(tokenizer, prompts))
