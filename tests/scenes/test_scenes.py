"""Scenes: images show what captions say, splits hold, and the reader's score is right."""

import dataclasses
import functools
import itertools
import json
import re

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from sdcomp.files import resolve_input
from sdcomp.model import TINY
from sdcomp.model.tokenizer import load_tokenizer, tokenize
from sdcomp.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    VOCABULARY,
    Scene,
    SceneReader,
    Thing,
    caption,
    captions,
    neighbor,
    prompt_accuracy,
    render,
    sample_scenes,
)
from sdcomp.scenes.reader import HEADS, head_targets
from sdcomp.training.caption_tokenizer import word_tokenizer

THINGS = [Thing(*values) for values in itertools.product(SHAPES, COLORS, SIZES, TEXTURES)]
SINGLES = [Scene(b, (thing,)) for b in BACKGROUNDS for thing in THINGS]

ONE = Scene("navy", (Thing("star", "red", "small", "plain"),))
TWO = Scene(
    "gray", (Thing("ring", "blue", "large", "striped"), Thing("cross", "green", "small", "plain")), "left"
)


# Captions, parsed by a grammar that is written a second time here

THING = (
    r"a (?P<size{0}>small|large) (?P<before{0}>plain |striped )?(?P<color{0}>\w+) (?P<shape{0}>\w+)"
    r"(?P<after{0}> with stripes)?"
)
CAPTION = re.compile(
    THING.format(1)
    + "(?: (?:(?P<left>(?:to the )?left of)|(?P<above>(?:directly )?above)) "
    + THING.format(2)
    + ")? (?:(?:on|against) a (?P<ground>\\w+) background|on (?P<bare>\\w+))"
)


def parse(text: str) -> dict:
    """Parse a caption into the form of `Scene.to_dict`; fail on any other text."""
    found = CAPTION.fullmatch(text)
    assert found, text
    assert not any((found[f"before{k}"] or "") and found[f"after{k}"] for k in (1, 2))
    things = tuple(
        {
            "shape": found[f"shape{k}"],
            "color": found[f"color{k}"],
            "size": found[f"size{k}"],
            "texture": "striped" if found[f"before{k}"] == "striped " or found[f"after{k}"] else "plain",
        }
        for k in (1, 2)
        if found[f"shape{k}"]
    )
    relation = "left" if found["left"] else "above" if found["above"] else None
    return {"background": found["ground"] or found["bare"], "things": things, "relation": relation}


@functools.cache
def many_scenes(split: str) -> list[Scene]:
    return sample_scenes(600, 5, split)


@pytest.fixture(scope="module")
def train_captions() -> list[str]:
    return captions(sample_scenes(8_000, 1), 2)


def test_every_wording_of_a_caption_says_the_whole_scene_and_nothing_else():
    # The parser sees only the text, so two scenes never share a caption.
    rng = np.random.default_rng(0)
    scenes = SINGLES + many_scenes("train") + many_scenes("test") + many_scenes("unseen")
    for scene in scenes:
        assert parse(caption(scene)) == scene.to_dict()
        assert parse(caption(scene, rng)) == scene.to_dict()


def test_wordings_vary_and_come_from_the_seed():
    scenes = [TWO] * 300
    texts = captions(scenes, 3)
    assert texts == captions(scenes, 3) != captions(scenes, 4)
    # Two wordings for each object, two for the relation, three for the background.
    assert len(set(texts)) == 2 * 2 * 2 * 3
    # Without a generator, the first wording of each part.
    expected = "a large striped blue ring left of a small green cross on a gray background"
    assert caption(TWO) == expected


# Splits


def test_a_scene_survives_json():
    for scene in (ONE, TWO):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_sampled_scenes_have_the_given_split_and_number_of_objects():
    for split, objects in itertools.product(("train", "test", "unseen"), (None, 1, 2)):
        scenes = sample_scenes(30, 0, split, objects)
        assert len(scenes) == 30 and {s.split for s in scenes} == {split}
        assert {len(s.things) for s in scenes} == ({1, 2} if objects is None else {objects})
        assert all((s.relation in RELATIONS) == (len(s.things) == 2) for s in scenes)
        assert scenes == sample_scenes(30, 0, split, objects) != sample_scenes(30, 1, split, objects)
    with pytest.raises(ValueError, match="train, test, unseen"):
        sample_scenes(1, 0, "validation")
    with pytest.raises(ValueError, match="1, 2 or None"):
        sample_scenes(1, 0, objects=3)


def test_training_has_all_combinations_but_six():
    def combinations(scenes: list[Scene]) -> set[tuple[str, ...]]:
        return {(t.shape, t.color, t.texture) for s in scenes for t in s.things}

    everything = set(itertools.product(SHAPES, COLORS, TEXTURES))
    seen = combinations(sample_scenes(5000, 7))
    unseen = everything - seen
    assert len(unseen) == 6
    # Each shape and each colour once, so that no shape and no colour is new.
    assert {u[0] for u in unseen} == set(SHAPES) and {u[1] for u in unseen} == set(COLORS)
    assert not combinations(many_scenes("test")) & unseen
    for scene in many_scenes("unseen"):
        assert combinations([scene]) & unseen


def test_splits_are_those_that_the_tiny_model_was_trained_with():
    # One scene in ten, by a hash of the content: the same in every process and on every machine.
    by_split = [scene.split for scene in SINGLES]
    assert [by_split.count(s) for s in ("train", "test", "unseen")] == [479, 49, 48]
    pairs = [Scene("navy", (a, b), "above") for a, b in itertools.product(THINGS[::5], THINGS[::7])]
    seen = [s.split for s in pairs if s.split != "unseen"]
    assert 0.08 < seen.count("test") / len(seen) < 0.13
    assert (ONE.split, TWO.split) == ("train", "train")


def test_training_has_no_held_out_caption(train_captions):
    held_out = set(captions(many_scenes("test"), 8)) | set(captions(many_scenes("unseen"), 9))
    assert len(set(train_captions)) > 4000 and len(held_out) > 700
    assert not held_out & set(train_captions)


def test_prompt_files_are_disjoint_and_match_their_scenes_and_splits(train_captions):
    texts, contents = {}, {}
    for name, split in (("test", "test"), ("final", "test"), ("unseen", "unseen"), ("calibration", "train")):
        lines = resolve_input(f"data/prompts/scenes_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) >= 256
        texts[name] = {row["prompt"] for row in rows}
        assert len(texts[name]) == len(rows)
        contents[name] = {Scene.from_dict(row["scene"]) for row in rows}
        assert {s.split for s in contents[name]} == {split}
        # Compare everything in the file, not only what the class reads.
        for row in rows:
            said = parse(row["prompt"])
            assert {**said, "things": list(said["things"])} == row["scene"]
    for a, b in itertools.combinations(texts, 2):
        assert not texts[a] & texts[b]
        # Test and final share the few held-out scenes of one object, in other words.
        shared = [scene for scene in contents[a] & contents[b] if len(scene.things) == 2]
        assert len(shared) <= (5 if (a, b) == ("test", "final") else 0)
        assert (a, b) == ("test", "final") or not contents[a] & contents[b]
    assert not (texts["test"] | texts["final"] | texts["unseen"]) & set(train_captions)


def test_a_neighbor_differs_in_one_point():
    rng = np.random.default_rng(0)
    kinds = set()
    for scene in [*many_scenes("train")[:300], *many_scenes("test")[:100], *many_scenes("unseen")[:100]]:
        other = neighbor(scene, rng)
        before, after = scene.attributes(), other.attributes()
        assert before.keys() == after.keys()
        changed = sorted(name for name in before if before[name] != after[name])
        assert changed
        if len(changed) == 1:
            kinds.add(changed[0])
            continue
        # Otherwise the two objects have swapped values.
        kinds.add("swap")
        names = {name.split("_")[0] for name in changed}
        assert changed == sorted(f"{name}_{k}" for name in names for k in (1, 2))
        assert all(before[f"{n}_1"] == after[f"{n}_2"] and before[f"{n}_2"] == after[f"{n}_1"] for n in names)
        unequal = {n for n in ("shape", "color", "size", "texture") if before[f"{n}_1"] != before[f"{n}_2"]}
        assert len(names) == 1 or names == unequal
    attributes = [f"{n}_{k}" for n in ("shape", "color", "size", "texture") for k in (1, 2)]
    assert kinds == {"swap", "background", "relation", *attributes}


# Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    vocab, merges = word_tokenizer(VOCABULARY)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TINY.text["max_position_embeddings"])


def test_every_word_of_a_caption_is_one_token(tokenizer):
    words = sorted({word for text in captions(many_scenes("train"), 0) for word in text.split()})
    assert set(words) <= set(VOCABULARY)
    ids = tokenizer(words).input_ids
    assert all(len(row) == 3 for row in ids)
    assert len({row[1] for row in ids}) == len(words)


def test_captions_fit_into_the_text_encoder(tokenizer, train_captions):
    longest = (
        "a large plain purple triangle to the left of a small yellow triangle with stripes against a "
        + ("brown background")
    )
    parse(longest)
    rows = tokenizer([*train_captions[:2000], longest]).input_ids
    assert max(len(row) for row in rows) <= 24
    # One token a word and one at each end: nothing was cut.
    assert all(
        len(row) == len(text.split()) + 2
        for row, text in zip(rows, [*train_captions[:2000], longest], strict=True)
    )


def test_start_and_end_have_the_two_highest_ids(tokenizer):
    # With another end token CLIP would pool the wrong token.
    assert len(tokenizer) == TINY.text["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == TINY.text[name]


def test_any_text_can_be_encoded_and_decoded(tokenizer):
    texts = ["", "naïve café", "🦊🔥 fox", "日本語", "A  Large\tRED star,\nno. 7!", "red " * 200, "x" * 500]
    ids = tokenize(tokenizer, texts)
    assert ids.shape == (len(texts), 24) and ids.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.eos_token_id).all()
    assert (ids[0, 1:] == tokenizer.eos_token_id).all()
    short = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
    assert short[:4] == ["", "naïve café", "🦊🔥 fox", "日本語"]
    assert short[4].replace(" ", "") == "alargeredstar,no.7!"
    assert short[5].split() == ["red"] * 22 and short[6] == "x" * 22


def test_the_shipped_tokenizer_is_made_from_the_captions(tokenizer):
    shipped = load_tokenizer(resolve_input("data/tiny"), TINY)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    texts = captions(many_scenes("test")[:50], 0)
    assert torch.equal(tokenize(shipped, texts), tokenize(tokenizer, texts))


# Rendering


def test_images_are_deterministic_and_have_the_documented_range_and_shape():
    scenes = sample_scenes(24, 0) + sample_scenes(8, 0, "unseen")
    images = render(scenes, 3)
    assert images.shape == (32, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, render(scenes, 3))
    assert not torch.equal(images, render(scenes, 4))


def test_an_image_does_not_depend_on_the_other_scenes():
    empty = Scene("teal", ())
    scenes = [ONE, TWO, empty, *sample_scenes(5, 1)]
    images = render(scenes, list(range(8)))
    for i, scene in enumerate(scenes):
        assert torch.equal(images[i], render([scene], [i])[0])
    backwards = render(scenes[::-1], list(range(8))[::-1])
    assert torch.equal(images, backwards.flip(0))


def test_each_attribute_changes_the_image():
    image = render([TWO], [0])[0]
    a, b = TWO.things
    changes = [
        dataclasses.replace(TWO, background="navy"),
        dataclasses.replace(TWO, relation="above"),
        dataclasses.replace(TWO, things=(b, a)),
        Scene("gray", (a,)),
        *(
            dataclasses.replace(TWO, things=(dataclasses.replace(a, **{name: value}), b))
            for name, value in (
                ("shape", "circle"), ("color", "purple"), ("size", "small"), ("texture", "plain")
            )
        ),
    ]  # fmt: skip
    for scene in changes:
        different = (render([scene], [0])[0] - image).abs().amax(0) > 0.1
        assert different.sum() >= 20, scene


def coverage(thing: Thing, seed: int) -> torch.Tensor:
    """The share of each pixel that the object covers, `(64, 64)`.

    The rest of the pixel shows the background: its share is what remains of the difference between two
    backgrounds. The colour must stay below full brightness in any light, as green does.
    """
    lit = [render([Scene(b, (thing,)), Scene(b, ())], [seed, seed]) for b in ("navy", "gray")]
    left = (lit[1][0] - lit[0][0]) / (lit[1][1] - lit[0][1])
    assert (left[0] - left[1]).abs().max() < 1e-4 and (left[0] - left[2]).abs().max() < 1e-4
    return 1 - left.mean(0)


def polygon(*corners: tuple[float, float]):
    """A point-in-polygon test: even-odd rule along a ray."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odd = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return odd

    return inside


def on_circle(radius: float, degrees: float) -> tuple[float, float]:
    """The corner that is `degrees` clockwise from the top, with y pointing down."""
    return radius * np.sin(np.radians(degrees)), -radius * np.cos(np.radians(degrees))


# Simple definitions of the shapes, up to size, and the order of their rotational symmetry.
REFERENCE = {
    "circle": (lambda x, y: x**2 + y**2 < 1, None),
    "square": (polygon((-1, -1), (1, -1), (1, 1), (-1, 1)), 4),
    "triangle": (polygon(*(on_circle(1, d) for d in (0, 120, 240))), 3),
    "star": (polygon(*(on_circle(0.45 if k % 2 else 1, 36 * k) for k in range(10))), 5),
    "cross": (lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.92), 4),
    "ring": (lambda x, y: (x**2 + y**2 < 0.94**2) & (x**2 + y**2 > 0.38**2), None),
}


def moments(share: np.ndarray, x: np.ndarray, y: np.ndarray, fold: int | None):
    """Area, centre, and rotation angle of a shape with that symmetry."""
    area = share.sum()
    cx, cy = (share * x).sum() / area, (share * y).sum() / area
    angle = 0.0 if fold is None else np.angle((share * (x - cx + 1j * (y - cy)) ** fold).sum()) / fold
    return area, cx, cy, angle


def difference(thing: Thing, seed: int, shape: str) -> float:
    """The distance of the rendered coverage from a supersampled reference of `shape`, relative to its area.

    The reference gets the size, place and tilt of the rendered shape.
    """
    inside, fold = REFERENCE[shape]
    rows = np.arange(64) + 0.5
    x, y = np.meshgrid(rows, rows)
    share = coverage(thing, seed).double().numpy()
    area, cx, cy, angle = moments(share, x, y, fold)

    # The reference's own size, centre and angle, at the origin and at high resolution.
    fine = (np.arange(400) + 0.5) / 200 - 1
    fx, fy = np.meshgrid(fine, fine)
    unit = moments(inside(fx, fy).astype(float), fx, fy, fold)
    scale = np.sqrt(area / (unit[0] / 200**2))
    turn = 0.0
    if fold is not None:
        # The nearest of the equivalent angles.
        turn = (angle - unit[3] + np.pi / fold) % (2 * np.pi / fold) - np.pi / fold
    assert shape != thing.shape or abs(turn) < np.radians(9)

    sub = (np.arange(64 * 8) + 0.5) / 8
    sx, sy = np.meshgrid(sub, sub)
    u, v = (sx - cx) / scale, (sy - cy) / scale
    u, v = u * np.cos(turn) + v * np.sin(turn) + unit[1], v * np.cos(turn) - u * np.sin(turn) + unit[2]
    expected = inside(u, v).reshape(64, 8, 64, 8).mean((1, 3))
    return np.abs(share - expected).sum() / area


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_agree_with_supersampled_references(shape):
    # Pixels differ only at the edge, and there only a little.
    for seed, size in ((0, "large"), (1, "small")):
        thing = Thing(shape, "green", size, "plain")
        assert difference(thing, seed, shape) < (0.03 if size == "large" else 0.05)
    # No other shape fits.
    others = [difference(thing, 1, other) for other in SHAPES if other != shape]
    assert min(others) > 0.08


def test_small_is_smaller_and_a_size_is_one_size_for_all_shapes():
    for shape in SHAPES:
        small, large = (coverage(Thing(shape, "green", size, "plain"), 2).sum() for size in SIZES)
        assert 1.6 < large / small < 2.7


def test_objects_stand_as_their_relation_says():
    rows = torch.arange(64) + 0.5
    for seed, relation in itertools.product(range(6), RELATIONS):
        a, b = Thing("circle", "red", "large", "plain"), Thing("square", "blue", "large", "plain")

        def center(index: int, relation=relation, seed=seed, things=(a, b)) -> tuple[float, float]:
            # An object is where the image changes when its colour changes.
            other = list(things)
            other[index] = dataclasses.replace(things[index], color="green")
            pair = [Scene("teal", things, relation), Scene("teal", tuple(other), relation)]
            images = render(pair, [seed, seed])
            mask = ((images[0] - images[1]).abs().amax(0) > 0.05).float()
            return ((mask * rows).sum() / mask.sum()).item(), ((mask.T * rows).sum() / mask.sum()).item()

        (ax, ay), (bx, by) = center(0), center(1)
        if relation == "left":
            assert bx - ax > 20 and abs(by - ay) < 15
        else:
            assert by - ay > 20 and abs(bx - ax) < 15


# Reader


class Answering(SceneReader):
    """A reader that always answers with the given scenes (None: cannot tell), for any images."""

    def __init__(self, scenes: list[Scene | None], probability: float = 0.999) -> None:
        super().__init__(width=8)
        self.targets, self.probability, self.row = head_targets(scenes), probability, 0

    def forward(self, images):
        rows = slice(self.row, self.row + len(images))
        self.row += len(images)
        logits = {}
        for name, values in HEADS.items():
            rest = (1 - self.probability) / len(values)
            p = torch.full((len(images), len(values) + 1), rest)
            p[torch.arange(len(images)), self.targets[name][rows]] = self.probability
            logits[name] = p.log()
        return logits


HEADS_OF_ONE = {"background", "count", "shape", "color", "size", "texture"}


def black(n: int) -> torch.Tensor:
    return torch.zeros(n, 3, 64, 64)


def test_a_perfect_reader_reads_the_scene():
    scenes = sample_scenes(40, 0) + sample_scenes(10, 0, "unseen")
    assert Answering(scenes).read(black(50), batch_size=7) == [s.attributes() for s in scenes]
    result = prompt_accuracy(Answering(scenes), black(50), scenes)
    assert result.all_right.tolist() == [True] * 50
    assert result.by_attribute.keys() == {*HEADS_OF_ONE, "relation"}
    for name, right in result.by_attribute.items():
        # A single object has no relation.
        expected = [1.0 if name != "relation" or len(s.things) == 2 else float("nan") for s in scenes]
        assert right.tolist() == pytest.approx(expected, nan_ok=True)


def test_one_wrong_attribute_makes_an_image_wrong_and_lowers_its_own_score():
    a, b = TWO.things
    shown = [
        TWO,
        dataclasses.replace(TWO, things=(a, dataclasses.replace(b, color="red"))),
        dataclasses.replace(TWO, relation="above"),
        dataclasses.replace(TWO, background="teal"),
    ]
    result = prompt_accuracy(Answering(shown), black(4), [TWO] * 4)
    assert result.all_right.tolist() == [True, False, False, False]
    right = {name: values.tolist() for name, values in result.by_attribute.items()}
    assert right.pop("color") == [1.0, 0.5, 1.0, 1.0]
    assert right.pop("relation") == [1.0, 1.0, 0.0, 1.0]
    assert right.pop("background") == [1.0, 1.0, 1.0, 0.0]
    assert all(values == [1.0] * 4 for values in right.values())


def test_a_missing_and_a_surplus_object_are_wrong():
    single = Scene(TWO.background, TWO.things[:1])
    result = prompt_accuracy(Answering([single, TWO]), black(2), [TWO, single])
    assert result.all_right.tolist() == [False, False]
    assert result.by_attribute["count"].tolist() == [0.0, 0.0]
    # All attributes of the missing object are wrong; those of the surplus object do not count.
    assert result.by_attribute["shape"].tolist() == [0.5, 1.0]
    assert result.by_attribute["relation"].tolist() == pytest.approx([0.0, float("nan")], nan_ok=True)


def test_cannot_tell_is_never_right():
    for reader in (Answering([None]), Answering([ONE], probability=0.49)):
        (answer,) = reader.read(black(1))
        assert set(answer) == set(HEADS) and set(answer.values()) == {"?"}
    for reader in (Answering([None]), Answering([ONE], probability=0.49)):
        result = prompt_accuracy(reader, black(1), [ONE])
        assert not result.all_right.any()
        assert all(right.nan_to_num().item() == 0 for right in result.by_attribute.values())


def test_an_untrained_reader_gives_well_formed_readings():
    torch.manual_seed(0)
    reader = SceneReader().eval()
    images = torch.cat([render(sample_scenes(6, 0), 0), torch.rand(6, 3, 64, 64), black(1)])
    assert {name: tuple(logits.shape) for name, logits in reader(images).items()} == {
        name: (13, len(values) + 1) for name, values in HEADS.items()
    }
    for threshold in (0.0, 0.5):
        answers = reader.read(images, threshold=threshold)
        assert len(answers) == 13
        for answer in answers:
            expected = set(HEADS)
            if answer["count"] == "1":
                expected = {n for n in HEADS if n != "relation" and not n.endswith("_2")}
            assert set(answer) == expected
            assert all(value in (*HEADS[name], "?") for name, value in answer.items())
    # An untrained network is sure of nothing.
    assert all(set(answer.values()) == {"?"} for answer in reader.read(images, threshold=0.9))
    assert reader.read(images[:0]) == []


def test_the_reader_refuses_images_of_another_size_or_type():
    reader = SceneReader(width=8)
    for shape in ((1, 3, 32, 32), (1, 1, 64, 64), (3, 64, 64), (1, 3, 64, 65)):
        with pytest.raises(ValueError, match=re.escape(f"not {shape}")):
            reader.read(torch.zeros(shape))
    with pytest.raises(ValueError, match="floating point"):
        reader.read(black(1).byte())
    with pytest.raises(ValueError):
        prompt_accuracy(Answering([ONE, ONE]), black(2), [ONE])
