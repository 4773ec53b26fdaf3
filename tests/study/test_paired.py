"""The paired protocol records the right comparison of a variant with the baseline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.evaluation import Clip, Prompts, bootstrap, cache, clip_scores, kid_values, load_prompts
from sdcomp.model.clip import build_clip
from sdcomp.scenes import render
from sdcomp.study import FP32, PairedStudy, Variant, pruned, quantized, reference_images
from sdcomp.study.paired import Reference
from sdcomp.study.scores import ImageScores


class Record:
    """Takes the place of a `Run`."""

    progress = False

    def __init__(self):
        self.rows, self.images = {}, ImageScores()

    def record(self, variant, metric, estimate, *, unit="", baseline="", **about):
        assert isinstance(variant, Variant)
        key = variant, metric, *about.values()
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
    options = {"reference": Reference(reference), "noise_images": 2, "shown": 32}
    return PairedStudy(Record(), seeing, prompts, **options, steps=2, batch_size=8, guidance_scale=1.0)


LOUDER, TWICE = quantized("mse", 6, 6), quantized("timestep_mse", 6, 6, 2)
BREAKS = quantized("max", 4, 4)


def test_a_variant_with_the_same_weights_differs_in_nothing(study, seeing):
    same = pruned("unstructured", 0.5)
    images = study.measure(same, seeing.unet)
    assert torch.equal(images, study.images)
    rows = study.run.rows
    for metric in ("CLIP score", "KID"):
        change = rows[same, f"{metric} difference"]
        assert (change.estimate.value, change.estimate.low, change.estimate.high) == (0, 0, 0)
        assert change.baseline == FP32
        assert rows[same, metric].estimate == rows[FP32, metric].estimate
    assert rows[same, "SSIM"].estimate.value == pytest.approx(1)
    assert rows[same, "PSNR"].estimate.value > 100
    assert rows[same, "noise MSE"].estimate.value < 1e-9


def test_a_variant_with_another_prediction_is_told_apart(study, seeing):
    study.measure(LOUDER, Louder(seeing.unet, 1.1))
    rows = study.run.rows
    assert rows[LOUDER, "PSNR"].estimate.value < 60 and rows[LOUDER, "PSNR"].estimate.n == 32
    assert rows[LOUDER, "SSIM"].estimate.value < 0.999
    # The prediction is a tenth larger, so the squared error of each step is 1 % of its power.
    power = study.trace.noise_predictions.square().mean((1, 2, 3, 4))
    for timestep, expected in zip(study.trace.timesteps.tolist(), 0.01 * power, strict=True):
        found = rows[LOUDER, "noise MSE at timestep", timestep].estimate
        assert found.value == pytest.approx(expected.item(), rel=1e-3) and found.n == 2
    # The weighted mean over the steps, by the weights that were recorded.
    steps = study.trace.timesteps.tolist()
    weights = [rows[FP32, "weight of the step", timestep].estimate for timestep in steps]
    assert sum(weights) == pytest.approx(1) and len(set(weights)) == 2
    errors = [rows[LOUDER, "noise MSE at timestep", timestep].estimate.value for timestep in steps]
    expected = sum(weight * error for weight, error in zip(weights, errors, strict=True))
    assert rows[LOUDER, "weighted noise MSE"].estimate.value == pytest.approx(expected, rel=1e-5)
    # 32 images cannot span 128 features, so there is no Frechet distance.
    assert not any("Frechet" in metric for _, metric, *_ in rows)


def test_fewer_steps_start_from_the_same_noise_and_have_no_noise_errors(study, seeing):
    few, starts = Variant(steps=1), []

    class Watched(nn.Module):
        def forward(self, latents, timesteps, context):
            starts.append(latents.clone())
            return seeing.unet(latents, timesteps, context)

    images = study.measure(few, Watched())
    assert len(starts) == 4  # one step of each of the batches
    assert torch.equal(torch.cat(starts)[:2], study.trace.latents[0])
    expected = seeing.generate(study.prompts.texts, steps=1, batch_size=8, guidance_scale=1.0)
    assert torch.equal(images, expected) and not torch.equal(images, study.images)
    measured = {metric for variant, metric, *_ in study.run.rows if variant == few}
    assert "CLIP score difference" in measured and not any("noise" in metric for metric in measured)


def test_losses_are_those_of_the_recorded_differences(study):
    study.measure(LOUDER, Louder(study.sd.unet, 1.1))
    for metric in study.scores:
        recorded = study.run.rows[LOUDER, f"{metric} difference"].estimate.value
        assert study.losses(LOUDER, metric).mean().item() == pytest.approx(recorded, abs=1e-4)


def test_every_result_says_its_condition_where_a_run_has_several(study, seeing):
    about = {"sampler": "ddim", "sampling_steps": 1}
    run, settings = Record(), {"steps": 1, "batch_size": 8, "guidance_scale": 1.0}
    other = PairedStudy(run, seeing, study.prompts, noise_images=2, about=about, **settings)
    other.measure(LOUDER, Louder(seeing.unet, 1.1))
    other.measure(TWICE, Louder(seeing.unet, 1.3))
    other.measure(BREAKS, Breaks(seeing.unet, 1.0, lambda latents, timestep: 0))
    assert (BREAKS, "failed", "ddim", 1) in run.rows
    other.run = Record()
    other.compare(TWICE, LOUDER)
    assert all(said[:2] == ["ddim", 1] for _, _, *said in (*run.rows, *other.run.rows))
    # The baseline is drawn again under this condition.
    assert not torch.equal(other.images, study.images)
    names = {name for cells in run.images._cells.values() for name in cells} - {"scene"}
    assert names and all(" ddim 1" in name for name in names)


def test_two_variants_are_compared_prompt_by_prompt(study, seeing):
    plain = study.measure(LOUDER, Louder(seeing.unet, 1.1))
    twice = study.measure(TWICE, Louder(seeing.unet, 1.3))
    measured, study.run = study.run.rows, Record()
    study.compare(TWICE, LOUDER)
    rows = {metric: row for (_, metric), row in study.run.rows.items()}
    assert set(study.run.rows) == {(TWICE, metric) for metric in rows}
    scores = ("CLIP score", "KID", "SSIM", "squared error", "noise MSE", "weighted noise MSE")
    assert set(rows) == {f"{score} difference" for score in scores}
    assert {row.baseline for row in rows.values()} == {LOUDER}

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
    # The values of KID and noise MSE themselves were recorded; their difference must agree.
    for metric in ("KID", "SSIM", "noise MSE", "weighted noise MSE"):
        values = [measured[variant, metric].estimate.value for variant in (TWICE, LOUDER)]
        assert rows[f"{metric} difference"].estimate.value == pytest.approx(values[0] - values[1], rel=1e-6)
    assert rows["noise MSE difference"].estimate.n == 2


def test_only_measured_variants_can_be_compared(study, seeing):
    study.measure(LOUDER, Louder(seeing.unet, 1.1))
    for variant, to in ((LOUDER, TWICE), (TWICE, LOUDER)):
        with pytest.raises(ValueError, match="measure 'timestep_mse k2 W6A6' before"):
            study.compare(variant, to)


def test_few_images_have_no_distance_between_sets(seeing, tmp_path, monkeypatch):
    monkeypatch.setitem(cache.cached_images.__kwdefaults__, "folder", tmp_path)
    reference = torch.rand(40, 3, 64, 64)
    for few in (["a star"] * 4, ["a star", "a ring"] * 16):
        study = PairedStudy(Record(), seeing, Prompts(few), reference=Reference(reference), steps=1)
        assert sorted(study.scores) == ["CLIP score"] and study.trace is None


def test_a_reference_of_two_images_is_refused_before_images_are_drawn(seeing, monkeypatch):
    drawn = "sdcomp.study.paired.cached_images"
    monkeypatch.setattr(drawn, lambda *_, **__: pytest.fail("images were drawn"))
    prompts = Prompts([f"star number {i}" for i in range(32)])
    for few in (Reference(torch.rand(2, 3, 64, 64)), Reference(torch.rand(4, 3, 64, 64), ["a", "b"] * 2)):
        with pytest.raises(UserError, match="name a reference with at least 3 images"):
            PairedStudy(Record(), seeing, prompts, reference=few, steps=1)


def test_without_a_judge_there_is_no_study(seeing, monkeypatch):
    drawn = "sdcomp.study.paired.cached_images"
    monkeypatch.setattr(drawn, lambda *_, **__: pytest.fail("images were drawn"))
    with pytest.raises(UserError, match="name a CLIP with -p clip_model"):
        PairedStudy(Record(), seeing.replace(clip=None, reader=None), Prompts(["a star"] * 4))


def test_a_run_names_the_judges_by_its_parameters(seeing, tmp_path, monkeypatch):
    monkeypatch.setitem(cache.cached_images.__kwdefaults__, "folder", tmp_path)
    monkeypatch.setitem(cache.cached_trace.__kwdefaults__, "folder", tmp_path)
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    run = Record()
    run.parameters = {"reference": str(tmp_path), "clip_model": "", "noise_images": 9, "seed": 0}
    prompts = Prompts([f"star number {i}" for i in range(32)])
    study = PairedStudy.of(run, seeing, prompts, steps=1, batch_size=8)
    assert len(study.traced) == 9 and len(study.reference.images) == 3
    run.rows.clear()
    # There are fewer prompts than noise predictions are asked for.
    few = PairedStudy.of(run, seeing, Prompts(["a star"] * 4), steps=1, batch_size=4)
    assert len(few.traced) == 4 and few.reference is None


def test_a_variant_with_images_that_are_not_finite_has_failed(study, seeing):
    asked = []

    def where(latents, timestep):
        rows = latents[:, 0, 0, 0] > 0
        asked.append((timestep, int(rows.sum())))
        return rows & (timestep < 500)

    assert study.measure(BREAKS, Breaks(seeing.unet, 1.0, where)) is None
    # Some images only, in the second of two steps.
    assert any(0 < rows < 8 for timestep, rows in asked if timestep < 500)
    (row,) = [row for (variant, *_), row in study.run.rows.items() if variant == BREAKS]
    assert study.run.rows[BREAKS, "failed"] is row
    assert row.estimate == 1 and "step 2 of 2" in row.unit and "\n" not in row.unit
    # It has no score to compare, and the next variant is measured as usual.
    study.measure(LOUDER, Louder(seeing.unet, 1.1))
    for variant, to in ((BREAKS, LOUDER), (LOUDER, BREAKS)):
        with pytest.raises(ValueError, match="measure 'max W4A4' before"):
            study.compare(variant, to)


def test_noise_predictions_that_are_not_finite_are_a_failure_even_if_all_images_are_finite(study, seeing):
    met = study.trace.latents[1, 0]  # which this variant does not meet on its own path

    def where(latents, timestep):
        return ((latents.cpu() - met).abs() < 1e-6).all((1, 2, 3)) if timestep < 500 else []

    assert study.measure(BREAKS, Breaks(seeing.unet, 1.1, where)) is None
    metrics = {metric for variant, metric, *_ in study.run.rows if variant == BREAKS}
    assert metrics == {"failed"}
    timestep = study.trace.timesteps[1].item()
    assert f"at timestep {timestep} of the baseline's path" in study.run.rows[BREAKS, "failed"].unit


def test_only_the_images_of_a_figure_are_kept(seeing, tmp_path, monkeypatch):
    monkeypatch.setitem(cache.cached_images.__kwdefaults__, "folder", tmp_path)
    prompts = Prompts([f"star number {i}" for i in range(4)])
    study = PairedStudy(Record(), seeing, prompts, shown=2, steps=1, batch_size=4)
    images = study.measure(LOUDER, seeing.unet)
    assert torch.equal(images, study.images[:2]) and images.untyped_storage().nbytes() == images.nbytes
    assert study.run.rows[LOUDER, "PSNR"].estimate.n == 4


def test_distances_are_to_scenes_of_the_prompt_set_or_to_the_images_named(tmp_path):
    tiny = sdcomp.load("data/tiny")
    prompts = load_prompts(tiny, "unseen", 4)
    assert torch.equal(reference_images(tiny, prompts, "unseen", seed=7).images, render(prompts.scenes, 7))
    both = reference_images(tiny, load_prompts(tiny, "test", 4), "test")
    assert len(both.images) == len(both.groups) == 512
    assert both.groups[:256] == load_prompts(tiny, "test", 256).groups
    assert reference_images(tiny, Prompts(["a star"]), "test") is None
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "white.png")
    white, scenes = reference_images(tiny, prompts, "test", images=str(tmp_path))
    assert scenes is None
    assert white.shape == (1, 3, tiny.config.image_size, tiny.config.image_size)
    assert white.min() > 0.999


def test_rendered_against_rendered_scenes_is_about_zero():
    tiny = sdcomp.load("data/tiny")
    prompts, clip = load_prompts(tiny, "test", 256), Clip.of(tiny)
    reference = reference_images(tiny, prompts, "test", seed=4)
    x, y = clip.embed_images(render(prompts.scenes, 99)), clip.embed_images(reference.images)
    kid = bootstrap(1000 * kid_values(x, y, prompts.groups, reference.groups), groups=prompts.groups)
    assert kid.low < 0 < kid.high
    # With pairs of one scene it is below 0 for certain.
    naive = bootstrap(1000 * kid_values(x, y), groups=prompts.groups)
    assert naive.value < kid.value and abs(kid.value) < abs(naive.value)


def test_with_guidance_the_branches_have_errors_of_their_own(seeing, tmp_path, monkeypatch):
    for function in (cache.cached_images, cache.cached_trace):
        monkeypatch.setitem(function.__kwdefaults__, "folder", tmp_path)
    prompts = Prompts([f"star number {i}" for i in range(4)])
    study = PairedStudy(Record(), seeing, prompts, noise_images=2, steps=2, batch_size=4, guidance_scale=3.0)
    study.measure(LOUDER, Louder(seeing.unet, 1.1))
    power = study.wanted.square().mean((1, 2, 3, 4, 5))
    for branch, expected in zip(("negative prompt", "prompt"), 0.01 * power, strict=True):
        found = study.run.rows[LOUDER, f"noise MSE of the {branch}"].estimate
        assert (found.value, found.n) == (pytest.approx(expected.item(), rel=1e-3), 2)
