"""Metrics of images against torchmetrics."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image import PeakSignalNoiseRatio

from sdcomp.errors import NonFiniteError
from sdcomp.evaluation import (
    Clip,
    Prompts,
    bootstrap,
    clip_scores,
    estimate,
    frechet_distance,
    kid_values,
    paired_difference,
    peak_memory,
    psnr,
    scores,
    ssim,
)
from sdcomp.evaluation.non_finite import require_finite
from sdcomp.model.clip import build_clip
from sdcomp.scenes import SceneReader, render, sample_scenes


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


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: 2 * x - 1])
def test_images_in_another_range_have_no_scores(change):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wrong = change(images)
    calls = [
        lambda: psnr(wrong, images),
        lambda: psnr(images, wrong),
        lambda: ssim(wrong, images),
        lambda: clip_scores(None, wrong, ["a star"] * 2),
        lambda: scores(None, wrong, Prompts(["a star"] * 2)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"floating point in \[0, 1\]: scale them first"):
            call()
    assert psnr((images + 1e-3).bfloat16(), images.bfloat16()).value > 40  # rounding is no other range


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
