"""Metrics against torchmetrics, and intervals against their known properties."""

import copy
import dataclasses
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image import PeakSignalNoiseRatio

from sdcomp.errors import NonFiniteError, UserError
from sdcomp.evaluation import (
    Clip,
    Estimate,
    Prompts,
    applicable,
    bootstrap,
    cached_images,
    clip_scores,
    estimate,
    frechet_distance,
    kid_values,
    load_prompts,
    paired_difference,
    peak_memory,
    psnr,
    scores,
    ssim,
)
from sdcomp.evaluation.statistics import require_finite
from sdcomp.model.text import build_clip
from sdcomp.scenes import Scene, SceneReader, render, sample_scenes

# Bootstrap


def test_for_many_values_the_interval_of_a_mean_is_the_normal_one():
    values = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.5, 4000))
    mean = bootstrap(values)
    error = values.std(unbiased=False).item() / math.sqrt(4000)
    assert mean.n == 4000
    assert mean.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert mean.low == pytest.approx(mean.value - 1.96 * error, abs=0.15 * error)
    assert mean.high == pytest.approx(mean.value + 1.96 * error, abs=0.15 * error)


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(2)
    baseline = torch.from_numpy(rng.normal(20, 5, 60))
    variant = baseline - 0.5 + 0.2 * torch.from_numpy(rng.normal(size=60))
    difference = bootstrap(variant - baseline)
    assert difference.low < -0.5 < difference.high < -0.3
    assert difference.high - difference.low < 0.1 * (bootstrap(variant).high - bootstrap(variant).low)


def test_an_interval_is_reproducible_and_ordered_after_a_falling_transform():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values) == bootstrap(values) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    plain, falling = bootstrap(values), bootstrap(values, lambda x: -np.log(x))
    assert falling.low < falling.value < falling.high
    assert falling.value == pytest.approx(-math.log(plain.value))
    assert (falling.low, falling.high) == pytest.approx(
        (-math.log(plain.high), -math.log(plain.low)), abs=1e-3
    )


def test_one_value_and_none():
    alone = bootstrap(torch.tensor([2.5]))
    assert (alone.value, alone.n) == (2.5, 1) and math.isnan(alone.low) and math.isnan(alone.high)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(torch.empty(0))
    assert str(Estimate(0.12345, 0.1, 0.2, 9)) == "0.123 [0.1, 0.2]"


def test_the_interval_is_that_of_all_resamples_drawn_at_once():
    values = torch.randn(137, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    means = values.numpy()[np.random.default_rng(5).integers(0, 137, (2000, 137))].mean(1)
    found = bootstrap(values, seed=5)
    # Student's quantile for 136 degrees of freedom is 1.97756. A resample's variance is 136 / 137 of the
    # unbiased one.
    tail = 50 * math.erfc(1.97756 * math.sqrt(137 / 136 / 2))
    assert [found.low, found.high] == pytest.approx(
        np.percentile(means, [tail, 100 - tail]).tolist(), rel=1e-4
    )


def test_images_of_one_scene_are_resampled_together():
    torch.manual_seed(0)
    scenes = torch.randn(40)
    repeated = scenes.repeat_interleave(10)
    groups = [f"scene {i // 10}" for i in range(400)]
    few, many = bootstrap(scenes), bootstrap(repeated, groups=groups)
    assert many.value == pytest.approx(few.value) and (few.n, many.n) == (40, 400)
    # Ten copies hold no more information than one, but would seem to if they were independent.
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)
    # The names of the scenes do not matter.
    assert bootstrap(repeated, groups=[999 - i // 10 for i in range(400)]) == many
    plain = bootstrap(repeated)
    assert plain.high - plain.low == pytest.approx((few.high - few.low) / math.sqrt(10), rel=0.15)


def test_values_that_do_not_apply_are_left_out():
    values = torch.tensor([1.0, math.nan, 3.0, math.nan])
    kept, groups = applicable(values, ["a", "b", "c", "d"])
    assert kept.tolist() == [1.0, 3.0] and groups == ["a", "c"]
    assert (bootstrap(kept, groups=groups).value, bootstrap(kept, groups=groups).n) == (2.0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_variant_gets_no_score_from_its_finite_values(bad):
    values = torch.tensor([1.0, bad, 3.0, 2.0])
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    broken, features = images.clone(), images.flatten(1)
    broken[2, 0, 0, 0] = bad
    spoiled = broken.flatten(1)
    calls = [
        lambda: bootstrap(values),
        lambda: estimate(values),
        lambda: paired_difference(values, torch.ones(4)),
        lambda: paired_difference(torch.ones(4), values),
        lambda: psnr(broken, images),
        lambda: psnr(images, broken),
        lambda: ssim(broken, images),
        lambda: kid_values(spoiled, features),
        lambda: kid_values(features, spoiled),
        lambda: frechet_distance(features[:, :2], spoiled[:, :2]),
        lambda: frechet_distance(spoiled[:, :2], features[:, :2]),
        lambda: clip_scores(None, broken, ["a star"] * 4),
        lambda: scores(None, broken, Prompts(["a star"] * 4)),
    ]
    for call in calls:
        with pytest.raises(NonFiniteError, match="are not finite; record the variant as failed"):
            call()


def test_ssim_takes_one_image_at_a_time():
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    together = structural_similarity_index_measure(noisy, images, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(noisy, images), together)


def test_scores_to_a_baseline_take_little_memory():
    baseline = torch.rand(32, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    images = 0.9 * baseline
    if (checked := peak_memory(lambda: require_finite("pixels", images, baseline))) is None:
        pytest.skip("this system does not tell how much memory a process had")
    assert checked < 2**22
    assert peak_memory(lambda: psnr(images, baseline)) < images.nbytes
    # SSIM takes 60 MB for one of these images, 1.5 GB for all at once.
    assert peak_memory(lambda: ssim(images, baseline)) < 2**28


def test_values_that_do_not_go_together_are_refused():
    values = torch.arange(4.0)
    for baseline in (torch.zeros(1), torch.zeros(5)):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_difference(values, baseline)
    with pytest.raises(ValueError, match="3 groups for 4 values"):
        bootstrap(values, groups=["a", "b", "c"])
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="floating point"):
        ssim((255 * images).byte(), images)


def test_a_share_has_wilsons_interval():
    right = torch.ones(32, dtype=torch.bool)
    # 32 of 32: Wilson's 95 % interval is 89.3 to 100 % (z^2 = 3.84: 32 / 35.84).
    assert estimate(right).low == pytest.approx(89.3, abs=0.05)
    assert estimate(right).high == pytest.approx(100)
    assert estimate(~right).high == pytest.approx(10.7, abs=0.05)
    # Eight scenes, four images each.
    assert estimate(right, [i % 8 for i in range(32)]).low == pytest.approx(100 * 8 / (8 + 3.8416), abs=0.05)
    right[:16] = False
    # 16 of 32: 33.63 to 66.37 %.
    assert (estimate(right).value, estimate(right).low) == pytest.approx((50, 33.63), abs=0.01)
    assert math.isnan(estimate(right, ["one scene"] * 32).low)


def test_without_a_changed_answer_the_interval_is_not_zero():
    right = torch.arange(256) % 2 == 0
    change = paired_difference(right, right)
    # At a difference d the most likely rates are d and 0. So n d^2 / (d - d^2) is 3.84 at the ends.
    assert change.value == 0 and change.low == pytest.approx(-change.high)
    assert change.high == pytest.approx(100 * 3.8415 / (256 + 3.8415), abs=1e-3)
    flipped = right.clone()
    flipped[0] = False
    one = paired_difference(flipped, right)
    assert (one.value, one.low, one.high) == pytest.approx((-0.39, -2.18, 1.09), abs=0.01)
    values = torch.rand(32)
    assert paired_difference(values + 1, values).value == pytest.approx(1)


# PSNR


def test_psnr_agrees_with_torchmetrics_over_the_whole_set():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.rand(12, 3, 16, 16, generator=generator)
    # Errors of very different sizes, so that a mean of decibels would be wrong.
    size = torch.logspace(-3, -0.5, 12).reshape(-1, 1, 1, 1)
    images = (baseline + size * torch.randn(baseline.shape, generator=generator)).clamp(0, 1)
    result = psnr(images, baseline)
    expected = PeakSignalNoiseRatio(data_range=1.0)(images, baseline).item()
    assert result.value == pytest.approx(expected, abs=1e-4)
    each = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="none")(images, baseline)
    assert result.value < each.mean() - 5
    assert each.min() < result.low < result.value < result.high < each.max() and result.n == 12
    # With two images of each scene, the value is the same and the interval wider.
    grouped = psnr(images, baseline, groups=[i // 2 for i in range(12)])
    assert grouped.value == result.value and grouped.high - grouped.low > result.high - result.low


def test_psnr_of_one_image_and_of_a_known_error():
    grey = torch.full((2, 3, 8, 8), 0.5)
    result = psnr(grey + 0.1, grey)
    assert (result.value, result.low, result.high) == pytest.approx((20, 20, 20), abs=1e-4)
    assert psnr(grey[:1] + 0.1, grey[:1]).value == pytest.approx(20, abs=1e-4)
    assert math.isfinite(psnr(grey, grey).value) and psnr(grey, grey).value >= 100


def test_psnr_refuses_integer_images_and_other_shapes():
    images = torch.rand(2, 3, 8, 8)
    for pair in (((images * 255).byte(), images), (images, (images * 255).byte())):
        with pytest.raises(ValueError, match="floating point"):
            psnr(*pair)
    with pytest.raises(ValueError, match="alike"):
        psnr(images, images[:1])


# CLIP score

PROMPTS = ["a small red star on a navy background", "a large blue ring on teal", "", "two zebras 🦓"] * 3


@pytest.fixture(scope="module")
def seeing(small, randomize):
    """The small model with an image encoder: a random CLIP."""
    clip = randomize(build_clip(small.config), 9)
    with torch.no_grad():
        clip.visual_projection.weight.neg_()  # otherwise nearly all scores would be negative
    return small.replace(clip=clip, text_encoder=clip.text_model)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    flat = torch.rand(12, 3, 1, 1, generator=generator)
    return (flat + 0.5 * torch.randn(12, 3, 64, 64, generator=generator)).clamp(0, 1)


def as_torchmetrics_wants_it(sd):
    """A CLIP model and a processor as `clip_score` takes them: features as tensors, pixels in [-1, 1]."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip, self.config = sd.clip, sd.clip.config

        def get_image_features(self, pixels):
            return self.clip.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, ids, mask):
            return self.clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def processor(text=None, images=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": (torch.stack(images) - 0.5) / 0.5}
        tokens = sd.tokenizer(text, return_tensors=return_tensors, padding=padding, truncation=True)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    return lambda: (Model(), processor)


def test_clip_scores_agree_with_torchmetrics(seeing, images):
    found = clip_scores(Clip.of(seeing), images, PROMPTS)
    assert found.shape == (12,) and found.dtype == torch.float32
    adapter = as_torchmetrics_wants_it(seeing)
    with torch.no_grad():
        each = torch.stack(
            [clip_score(i, p, model_name_or_path=adapter) for i, p in zip(images, PROMPTS, strict=True)]
        )
        assert torch.allclose(found, each, rtol=0, atol=1e-3)
        # Cosines of both signs occur, and a score is never negative.
        assert (found == 0).any() and (found > 1).any() and (found >= 0).all()
        kept = (found > 0).nonzero()[:, 0]
        mean = clip_score(list(images[kept]), [PROMPTS[i] for i in kept], model_name_or_path=adapter)
    assert found[kept].mean().item() == pytest.approx(mean.item(), abs=1e-3)
    assert len(kept) > 6 and found[kept].std() > 0.01


def test_embeddings_do_not_depend_on_the_batch_size(seeing, images):
    clip = Clip.of(seeing)
    assert torch.allclose(clip.embed_images(images, 5), clip.embed_images(images), rtol=0, atol=1e-5)
    assert torch.allclose(clip.embed_texts(PROMPTS, 5), clip.embed_texts(PROMPTS), rtol=0, atol=1e-5)


def test_clip_scores_refuse_wrong_input(seeing, small, images):
    with pytest.raises(ValueError, match="floating point"):
        clip_scores(Clip.of(seeing), (images * 255).byte(), PROMPTS)
    for prompts in (PROMPTS[:1], [*PROMPTS, ""]):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts for 12 images"):
            clip_scores(Clip.of(seeing), images, prompts)
    with pytest.raises(ValueError, match="no CLIP image encoder"):
        Clip.of(small.replace(clip=None))


def test_scores_depend_on_the_judges_that_the_model_has(seeing, small):
    scenes = sample_scenes(12, 0)
    images, prompts = render(scenes, 0), Prompts(PROMPTS, scenes)
    assert scores(small, images, prompts) == {}
    only = scores(seeing, images, prompts)
    assert set(only) == {"CLIP score"}
    assert torch.equal(only["CLIP score"], clip_scores(Clip.of(seeing), images, PROMPTS))
    reading = seeing.replace(reader=SceneReader(width=8).eval())
    both = scores(reading, images, prompts)
    assert set(both) == {"prompt accuracy", "CLIP score"}
    assert both["prompt accuracy"].dtype == torch.bool and both["prompt accuracy"].shape == (12,)
    # Without scenes there is nothing to compare the reading with.
    assert set(scores(reading, images, Prompts(PROMPTS))) == {"CLIP score"}


# Cached images

FEW = ["a small red star on navy", "a large ring on teal"]
QUICK = {"steps": 1, "batch_size": 2}


def test_images_are_generated_once(small, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    images = cached_images(small, FEW, folder=folder, **QUICK)
    assert torch.equal(images, small.generate(FEW, **QUICK))
    (file,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(type(small), "generate", None)
        again = cached_images(small, FEW, folder=folder, progress=True, **QUICK)
    assert torch.equal(again, images) and again.dtype == images.dtype
    # A damaged file is made again.
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert torch.equal(cached_images(small, FEW, folder=folder, **QUICK), images)
    assert file.read_bytes() == whole and list(folder.iterdir()) == [file]


def test_every_change_that_matters_makes_new_images(small, tmp_path):
    unet = copy.deepcopy(small.unet)
    with torch.no_grad():
        unet.out[2].bias[0] += 1e-6
    guided = dataclasses.replace(small.config, guidance_scale=3.25)
    picture = torch.full((1, 3, 64, 64), 0.5)
    dotted = picture.clone()
    dotted[0, 1, 30, 30] += 1e-4
    variants = [
        (small, FEW, {}),
        (small, FEW[::-1], {}),
        (small, FEW, {"seed": 1}),
        (small, FEW, {"sampler": "ddpm"}),
        (small.replace(unet=unet), FEW, {}),
        (small.replace(config=guided), FEW, {}),
        (small, FEW, {"image": picture, "strength": 1.0}),
        # The printed text of both tensors is the same.
        (small, FEW, {"image": dotted, "strength": 1.0}),
    ]
    for count, (sd, prompts, settings) in enumerate(variants, start=1):
        images = cached_images(sd, prompts, folder=tmp_path, **QUICK, **settings)
        assert torch.equal(images, sd.generate(prompts, **QUICK, **settings))
        assert len(list(tmp_path.iterdir())) == count


def test_an_unwritable_cache_is_an_error_of_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written") as caught:
        cached_images(small, FEW, folder=tmp_path / "file", **QUICK)
    assert "\n" not in str(caught.value)

    def full(*_):
        # The error that safetensors raises.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sdcomp.evaluation.cache.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        cached_images(small, FEW, folder=tmp_path / "images", **QUICK)
    assert not list((tmp_path / "images").iterdir())


# Prompts

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
        (SCENES, "test", 257, "n_images must be 1 to 256, the size of scenes_test.jsonl, not 257"),
        (SCENES, "test", 0, "n_images must be 1 to 256"),
        (SCENES, "test", -3, "n_images must be 1 to 256"),
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
