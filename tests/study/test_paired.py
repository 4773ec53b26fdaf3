"""The paired protocol records what comparing a variant with its baseline should give."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.evaluation import Prompts, cache, clip_scores, load_prompts
from sdcomp.model.text import build_clip
from sdcomp.scenes import render
from sdcomp.study import PairedStudy, reference_images


class Record:
    """Takes the place of a `Run`."""

    progress = False

    def __init__(self):
        self.rows = {}

    def record(self, method, metric, estimate, *, unit="", baseline="", **parameters):
        key = method, metric, *parameters.values()
        assert key not in self.rows
        self.rows[key] = SimpleNamespace(estimate=estimate, unit=unit, baseline=baseline)


class Louder(nn.Module):
    def __init__(self, unet, factor):
        super().__init__()
        self.unet, self.factor = unet, nn.Parameter(torch.tensor(factor))

    def forward(self, latents, timesteps, context):
        return self.factor * self.unet(latents, timesteps, context)


class Breaks(Louder):
    """NaN at the rows that `where(latents, timestep)` names."""

    def __init__(self, unet, factor, where):
        super().__init__(unet, factor)
        self.where = where

    def forward(self, latents, timesteps, context):
        found = super().forward(latents, timesteps, context)
        found[self.where(latents, int(torch.as_tensor(timesteps).flatten()[0]))] = float("nan")
        return found


@pytest.fixture(scope="module")
def seeing(small, randomize):
    clip = randomize(build_clip(small.config), 9)
    return small.replace(clip=clip, text_encoder=clip.text_model)


@pytest.fixture
def study(seeing, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    for function in (cache.cached_images, cache.cached_trace):
        monkeypatch.setitem(function.__kwdefaults__, "folder", tmp_path)
    prompts = Prompts([f"star number {i}" for i in range(32)])
    reference = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    options = {"baseline": "as it is", "reference": reference, "noise_images": 2, "shown": 32}
    return PairedStudy(Record(), seeing, prompts, **options, steps=2, batch_size=8, guidance_scale=1.0)


def test_a_variant_that_is_the_baseline_differs_in_nothing(study, seeing):
    images = study.measure("same", seeing.unet, amount=0.0)
    assert torch.equal(images, study.images)
    rows = study.run.rows
    for metric in ("CLIP score", "KID"):
        change = rows["same", f"{metric} difference", 0.0]
        assert (change.estimate.value, change.estimate.low, change.estimate.high) == (0, 0, 0)
        assert change.baseline == "as it is"
        assert rows["same", metric, 0.0].estimate == rows["as it is", metric].estimate
    assert rows["same", "SSIM", 0.0].estimate.value == pytest.approx(1)
    assert rows["same", "PSNR", 0.0].estimate.value > 100
    assert rows["same", "noise MSE", 0.0].estimate.value < 1e-9


def test_a_variant_with_another_prediction_is_told_apart(study, seeing):
    study.measure("louder", Louder(seeing.unet, 1.1), amount=0.1)
    rows = study.run.rows
    assert rows["louder", "PSNR", 0.1].estimate.value < 60 and rows["louder", "PSNR", 0.1].estimate.n == 32
    assert rows["louder", "SSIM", 0.1].estimate.value < 0.999
    # Each step's error is that of the prediction made a tenth larger.
    power = study.trace.noise_predictions.square().mean((1, 2, 3, 4))
    for timestep, expected in zip(study.trace.timesteps.tolist(), 0.01 * power, strict=True):
        found = rows["louder", "noise MSE at timestep", timestep, 0.1].estimate
        assert found.value == pytest.approx(expected.item(), rel=1e-3) and found.n == 2
    # 32 images cannot span 128 features, so there is no Frechet distance.
    assert not any("Frechet" in metric for _, metric, *_ in rows)


def test_two_variants_are_compared_prompt_by_prompt(study, seeing):
    plain = study.measure("louder", Louder(seeing.unet, 1.1), bits=6)
    twice = study.measure("twice", Louder(seeing.unet, 1.3), bits=6, k=2)
    study.measure("louder", Louder(seeing.unet, 0.5), bits=4)
    measured, study.run = study.run.rows, Record()
    study.compare("twice", "louder", bits=6, k=2)
    rows = {metric: row for (_, metric, *_), row in study.run.rows.items()}
    assert set(study.run.rows) == {("twice", metric, 6, 2) for metric in rows}
    assert set(rows) == {"CLIP score difference", "KID difference", "noise MSE difference"}
    assert {row.baseline for row in rows.values()} == {"louder"}

    # A paired bootstrap by hand: prompts drawn with replacement, each with the images of both.
    one, other = (clip_scores(study.clip, x, study.prompts.texts).double().numpy() for x in (twice, plain))
    rng = np.random.RandomState(1)
    means = []
    for _ in range(4000):
        drawn = rng.choice(32, 32)
        means.append(one[drawn].mean() - other[drawn].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    found = rows["CLIP score difference"].estimate
    assert found.n == 32 and rows["CLIP score difference"].unit == "100 x cosine"
    assert found.value == pytest.approx(one.mean() - other.mean(), rel=1e-6)
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.1 * (high - low))
    # Differences to a third cancel, so what was recorded of each gives the rest.
    for metric in ("KID", "noise MSE"):
        values = [measured[key].estimate.value for key in (("twice", metric, 6, 2), ("louder", metric, 6))]
        assert rows[f"{metric} difference"].estimate.value == pytest.approx(values[0] - values[1], rel=1e-6)
    assert rows["noise MSE difference"].estimate.n == 2


def test_only_what_was_measured_can_be_compared(study, seeing):
    study.measure("louder", Louder(seeing.unet, 1.1), bits=6)
    for method, to, bits in (("louder", "other", 6), ("other", "louder", 6), ("louder", "louder", 4)):
        with pytest.raises(ValueError, match=f"measure '{'other' if bits == 6 else 'louder'}' with"):
            study.compare(method, to, bits=bits)


def test_few_images_have_no_distance_between_sets(seeing, tmp_path, monkeypatch):
    monkeypatch.setitem(cache.cached_images.__kwdefaults__, "folder", tmp_path)
    reference = torch.rand(40, 3, 64, 64)
    few = Prompts(["a star"] * 4)
    study = PairedStudy(Record(), seeing, few, baseline="b", reference=reference, steps=1, batch_size=4)
    assert sorted(study.scores) == ["CLIP score"] and study.trace is None


def test_without_a_judge_there_is_no_study(seeing, monkeypatch):
    drawn = "sdcomp.study.paired.cached_images"
    monkeypatch.setattr(drawn, lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(UserError, match="name a CLIP with -p clip_model"):
        PairedStudy(Record(), seeing.replace(clip=None, reader=None), Prompts(["a star"] * 4), baseline="b")


def test_a_variant_with_images_that_are_not_finite_has_failed(study, seeing):
    asked = []

    def where(latents, timestep):
        rows = latents[:, 0, 0, 0] > 0
        asked.append((timestep, int(rows.sum())))
        return rows & (timestep < 500)

    assert study.measure("breaks", Breaks(seeing.unet, 1.0, where), bits=4) is None
    # Some images only, in the second of two steps.
    assert any(0 < rows < 8 for timestep, rows in asked if timestep < 500)
    (row,) = [row for (method, *_), row in study.run.rows.items() if method == "breaks"]
    assert study.run.rows["breaks", "failed", 4] is row
    assert row.estimate == 1 and "step 2 of 2" in row.unit and "\n" not in row.unit
    # No score of it can be compared with, and the next variant is measured as ever.
    study.measure("louder", Louder(seeing.unet, 1.1), bits=4)
    for method, to in (("breaks", "louder"), ("louder", "breaks")):
        with pytest.raises(ValueError, match="measure 'breaks' with"):
            study.compare(method, to, bits=4)


def test_noise_predictions_that_are_not_finite_are_a_failure_though_all_images_are(study, seeing):
    met = study.trace.latents[1, 0]  # which this variant does not meet on its own way

    def where(latents, timestep):
        return ((latents.cpu() - met).abs() < 1e-6).all((1, 2, 3)) if timestep < 500 else []

    assert study.measure("breaks", Breaks(seeing.unet, 1.1, where), bits=4) is None
    metrics = {metric for method, metric, *_ in study.run.rows if method == "breaks"}
    assert metrics == {"failed"}
    timestep = study.trace.timesteps[1].item()
    assert f"at timestep {timestep} of the baseline's path" in study.run.rows["breaks", "failed", 4].unit


def test_only_the_images_of_a_figure_are_kept(seeing, tmp_path, monkeypatch):
    monkeypatch.setitem(cache.cached_images.__kwdefaults__, "folder", tmp_path)
    prompts = Prompts([f"star number {i}" for i in range(4)])
    study = PairedStudy(Record(), seeing, prompts, baseline="b", shown=2, steps=1, batch_size=4)
    images = study.measure("same", seeing.unet)
    assert torch.equal(images, study.images[:2]) and images.untyped_storage().nbytes() == images.nbytes
    assert study.run.rows["same", "PSNR"].estimate.n == 4


def test_distances_are_to_scenes_of_the_prompt_set_or_to_the_images_named(tmp_path):
    tiny = sdcomp.load("data/tiny")
    prompts = load_prompts(tiny, "unseen", 4)
    # There are fewer than 512 of this set.
    assert torch.equal(reference_images(tiny, prompts, "unseen", seed=7), render(prompts.scenes, 7))
    assert len(reference_images(tiny, load_prompts(tiny, "test", 4), "test")) == 512
    assert reference_images(tiny, Prompts(["a star"]), "test") is None
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "white.png")
    white = reference_images(tiny, prompts, "test", images=str(tmp_path))
    assert white.shape == (1, 3, tiny.config.image_size, tiny.config.image_size)
    assert white.min() > 0.999
