"""Every interval follows from the scores of single images, as they are written."""

from types import SimpleNamespace

import pandas as pd
import pytest
import recompute_intervals
import torch
from made_up import STUDY, notebook
from made_up import made_up_study as made_up_study

from sdcomp.evaluation import bootstrap, estimate, paired_difference, share_estimate
from sdcomp.evaluation.metrics import decibels
from sdcomp.study import FP32, Run, Variant, quantized
from sdcomp.study.scores import ReadScores

MSE = quantized("mse", 6, 6)
SCENES = [("scene", i // 2) for i in range(40)]


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(40, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with every kind of score."""
    run = Run(STUDY, notebook({"out": str(tmp_path / "results")}))
    right = {FP32: drawn(0) < 0.9, MSE: drawn(1) < 0.6}
    clip = {FP32: 20 + drawn(2), MSE: 19 + drawn(3)}
    for subject in (FP32, MSE):
        for metric, values in (("prompt accuracy", right[subject]), ("CLIP score", clip[subject])):
            run.record(subject, metric, estimate(values, SCENES))
            run.images.keep(subject, metric, values, SCENES)
    for metric, values in (("prompt accuracy", right), ("CLIP score", clip)):
        change = paired_difference(values[MSE], values[FP32], SCENES)
        run.record(MSE, f"{metric} difference", change, baseline=FP32)
    run.record(MSE, "PSNR", decibels(drawn(4).double(), SCENES), unit="dB", baseline=FP32)
    run.images.keep(MSE, "squared error", drawn(4).double(), SCENES)
    # Of the first images only, of the images to which it applies, and of other prompts.
    run.record(MSE, "noise MSE at timestep", estimate(drawn(5)[:9], SCENES[:9]), baseline=FP32, timestep=951)
    run.images.keep(MSE, "noise MSE at timestep", drawn(5)[:9], SCENES[:9], timestep=951)
    share = torch.where(drawn(6) < 0.5, float("nan"), (drawn(7) < 0.1).float())
    kept = [i for i in range(40) if not share[i].isnan()]
    run.record(
        MSE, "size right", share_estimate(share[kept], [SCENES[i] for i in kept]), unit="%", attribute="size"
    )
    run.images.keep(MSE, "size right", share, SCENES, attribute="size")
    # Under another condition, beside fp32 under the same one; and of some images only.
    about = {"sampler": "ddpm", "sampling_steps": 9}
    for subject, values in ((FP32, drawn(9) < 0.9), (MSE, drawn(10) < 0.7)):
        run.images.keep(subject, "prompt accuracy", values, SCENES, **about)
    change = paired_difference(drawn(10) < 0.7, drawn(9) < 0.9, SCENES)
    run.record(MSE, "prompt accuracy difference", change, baseline=FP32, **about)
    run.record(MSE, "PSNR", decibels(drawn(11).double(), SCENES), unit="dB", baseline=FP32, **about)
    run.images.keep(MSE, "squared error", drawn(11).double(), SCENES, **about)
    some = [i for i in range(40) if i % 3]
    right, scenes = drawn(12)[some] < 0.5, [SCENES[i] for i in some]
    run.record(MSE, "attribute accuracy", estimate(right, scenes), unit="%", attribute="size")
    run.images.keep(MSE, "attribute accuracy", right, scenes, places=some, attribute="size")
    run.record(MSE, "gain", bootstrap(drawn(8), groups=SCENES), unit="%", baseline=FP32)
    run.images.keep(MSE, "gain", drawn(8), SCENES, prompts="probes")
    return run


def test_scores_survive_the_file_bit_by_bit(run):
    run.save()
    scores = ReadScores(run.folder / "images.csv")
    assert list(scores.table)[:4] == ["subject", "prompts", "image", "scene"]
    assert len(scores.table) == 3 * 40
    right, scenes = scores.of("fp32", "prompt accuracy")
    assert right.dtype == torch.bool and torch.equal(right, drawn(0) < 0.9)
    assert scenes == [i // 2 for i in range(40)]
    assert torch.equal(scores.of(MSE.label, "CLIP score")[0].float(), 19 + drawn(3))
    assert len(scores.of(MSE.label, "noise MSE at timestep 951")[0]) == 9
    assert scores.of("fp32", "noise MSE at timestep 951") is None and scores.of("fp32", "KID") is None


def test_a_run_without_images_leaves_no_scores(tmp_path):
    run = Run(STUDY, notebook({"out": str(tmp_path / "results")}))
    run.save()
    assert not (run.folder / "images.csv").exists()


def test_the_tool_finds_every_interval_again(run, capsys):
    run.record(MSE, "time relative to fp32", SimpleNamespace(value=1.0, low=0.9, high=1.1, n=5))
    run.save()
    assert recompute_intervals.main([str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert "13 intervals are the same" in said and "time relative to fp32" in said


def test_a_second_prompt_set_and_another_order_of_rows_change_nothing(run, capsys):
    """Rows are joined by prompt set and image; each result takes the scores of its own prompts."""
    for subject, seed in ((FP32, 20), (MSE, 21)):
        clip = 20 + drawn(seed)
        run.record(subject, "CLIP score", estimate(clip, SCENES), prompts="final")
        run.images.keep(subject, "CLIP score", clip, SCENES, prompts="final")
    change = paired_difference(20 + drawn(21), 20 + drawn(20), SCENES)
    run.record(MSE, "CLIP score difference", change, baseline=FP32, prompts="final")
    run.save()
    path = run.folder / "images.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    baseline = table.subject == "fp32"
    pd.concat([table[~baseline], table[baseline][::-1]]).to_csv(path, index=False)
    assert recompute_intervals.main([str(run.folder)]) == 0
    assert "16 intervals are the same" in capsys.readouterr().out


def test_differences_of_differences_follow_from_four_scores(tmp_path, capsys):
    """How much more a quantization costs a pruned UNet, and how much more another condition costs."""
    run = Run(STUDY, notebook({"out": str(tmp_path / "results")}))
    pruned = Variant("unstructured", 0.3)
    both = quantized("mse", 6, 6, of=pruned)
    right = {subject: drawn(seed) < 0.7 for seed, subject in enumerate((FP32, MSE, pruned, both))}
    other = {subject: drawn(seed) < 0.6 for seed, subject in enumerate((FP32, MSE), 4)}
    for about, values in (({}, right), ({"sampler": "ddpm"}, other)):
        for subject, shares in values.items():
            run.images.keep(subject, "prompt accuracy", shares, SCENES, **about)
    ones = {subject: shares.to(torch.int8) for subject, shares in right.items()}
    interaction = paired_difference(ones[both] - ones[pruned], ones[MSE] - ones[FP32], SCENES)
    run.record(both, "interaction of the prompt accuracy difference", interaction, unit="%", baseline=MSE)
    lost = other[MSE].to(torch.int8) - other[FP32].to(torch.int8)
    change = paired_difference(lost, ones[MSE] - ones[FP32], SCENES)
    own = "ddim, 20 steps"
    run.record(MSE, "change of the prompt accuracy difference", change, baseline=own, sampler="ddpm")
    run.save()
    assert recompute_intervals.main([str(run.folder)]) == 0
    assert "2 intervals are the same" in capsys.readouterr().out


def test_the_tool_tells_what_differs(run, capsys):
    run.save()
    path = run.folder / "images.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[table.index[table["prompt accuracy"] == "False"][0], "prompt accuracy"] = "True"
    table.to_csv(path, index=False)
    assert recompute_intervals.main([str(run.folder)]) == 1
    said = capsys.readouterr().out
    assert "fp32, prompt accuracy  differs" in said and "2 differ" in said
