"""Prompts of named sets and of files."""

import json
import os
from types import SimpleNamespace

import pytest

from sdcomp.errors import UserError
from sdcomp.evaluation import load_prompts
from sdcomp.scenes import Scene, SceneReader

SCENES, PHOTOS = SimpleNamespace(reader=SceneReader(width=8)), SimpleNamespace(reader=None)


def test_prompts_are_the_first_of_their_set_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in (("test", 256), ("final", 256), ("unseen", 256), ("calibration", 512)):
        prompts = load_prompts(SCENES, name, size)
        assert len(prompts) == len(prompts.texts) == len(prompts.scenes) == size
        assert all(isinstance(scene, Scene) for scene in prompts.scenes)
        few = load_prompts(SCENES, name, 3)
        assert (few.texts, few.scenes) == (prompts.texts[:3], prompts.scenes[:3])
        # Images of one scene form one group, for any wording.
        assert len(set(prompts.groups)) == len(set(prompts.scenes)) < size
        part = prompts.subset([4, 0])
        assert part.texts == [prompts.texts[4], prompts.texts[0]]
        assert part.scenes == [prompts.scenes[4], prompts.scenes[0]]
    photos = load_prompts(PHOTOS, "test", 8)
    assert photos.groups == photos.texts and photos.subset([1]).scenes is None
    assert len(photos) == 8 and photos.scenes is None
    assert not set(photos.texts) & set(load_prompts(PHOTOS, "calibration", 16).texts)


def test_a_set_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    row = json.dumps({"prompt": "mine"})
    (tmp_path / "data" / "prompts" / "sd15_test.jsonl").write_text(row + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_prompts(PHOTOS, "test", 1).texts == ["mine"]


@pytest.mark.parametrize(
    ("sd", "name", "n", "message"),
    [
        (SCENES, "test", 257, "scenes_test.jsonl has 256 prompts: ask for 1 to 256, not for 257"),
        (SCENES, "test", 0, "ask for 1 to 256, not for"),
        (SCENES, "test", -3, "ask for 1 to 256, not for"),
        (SCENES, "validation", 1, "scenes_validation.jsonl is missing"),
        (PHOTOS, "unseen", 1, "sd15_unseen.jsonl is missing: there is no 'unseen' prompt set for this model"),
    ],
)
def test_missing_prompts_are_refused_in_one_sentence(sd, name, n, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(sd, name, n)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "caf\u00e9".encode("latin-1"), b'{"prompt": 3}', b'["prompt"]', b"3", b"{", b'{"text": "a star"}',
        b'{"prompt": "a star", "scene": 3}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_without_prompts_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no prompt file: each line must be like") as caught:
        load_prompts(PHOTOS, str(file), 1)
    assert str(caught.value).isprintable()


def test_a_pipe_is_no_prompt_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is a pipe, a socket or a device, not a file"):
        load_prompts(PHOTOS, str(tmp_path / "pipe.txt"), 1)


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl"])
def test_a_mark_of_the_byte_order_and_spaces_at_the_ends_change_no_prompt(tmp_path, name):
    lines = ["a red star", "a blue ring "] if name.endswith("txt") else ['{"prompt": "a red star"}', ""]
    path = tmp_path / name
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert load_prompts(PHOTOS, str(path), 1).texts == ["a red star"]
    if name.endswith("txt"):
        assert load_prompts(PHOTOS, str(path), 2).texts[1] == "a blue ring"
    else:
        with pytest.raises(UserError, match=r"mine.jsonl has 1 prompt: ask for 1 to 1, not for 2"):
            load_prompts(PHOTOS, str(path), 2)
