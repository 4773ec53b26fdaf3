"""Calibration: ranges, intervals, policies; and what is saved of it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from sdcomp.quantization import (
    CalibrationError,
    Calibrator,
    NotCalibratedError,
    QuantizationFileError,
    QuantModel,
    TimeStepCalibratedQuantModel,
    UniformSymmetricQuantizer,
    describe,
    load_quant_model,
    save_quant_model,
)
from sdcomp.quantization.intervals import group_costs, optimal_groups, optimal_starts
from sdcomp.quantization.ranges import Histogram

PROMPTS = ["a red star on a navy background", "a blue circle", "a green square left of a red star"]
SIX = {"n_bits": 6}


def calibrate(sd, q, steps=4, prompts=PROMPTS, **kwargs):
    names = ("act_scale_policy", "act_update_policy", "momentum", "quantized_inputs")
    policies = {name: kwargs.pop(name) for name in names if name in kwargs}
    calibrator = Calibrator(sd, q, **policies)
    calibrator.calibrate(prompts, steps=steps, guidance_scale=3.0, **kwargs)
    return calibrator


def scales(q) -> list[torch.Tensor]:
    return [layer.act_scale for layer in q.quantized_layers()]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(scales(a), scales(b), strict=True))


def seen_inputs(sd, names, steps=4, prompts=PROMPTS, batch_size=3, **kwargs):
    """The inputs of some layers of the plain UNet at each call of the same generation: (timestep, input)."""
    seen = {name: [] for name in names}

    def note(_: nn.Module, args: tuple) -> None:
        seen.setdefault("t", []).append(int(torch.as_tensor(args[1]).flatten()[0]))

    handles = [sd.unet.register_forward_pre_hook(note)]
    for name in names:
        hook = lambda m, args, n=name: seen[n].append((seen["t"][-1], args[0].clone()))  # noqa: E731
        handles.append(sd.unet.get_submodule(name).register_forward_pre_hook(hook))
    sd.generate(prompts, steps=steps, sampler="ddpm", guidance_scale=3.0, batch_size=batch_size, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


LAYERS = ("time_embed.2", "input_blocks.2.0.op", "middle_block.1.proj_in", "out.2")


@pytest.mark.parametrize("policy", ["max", "mse"])
@pytest.mark.parametrize("update", ["maximum", "momentum"])
def test_ranges_are_those_of_the_inputs_of_the_plain_model(small, policy, update):
    q = TimeStepCalibratedQuantModel(small.unet, k=2, act_quant_params=SIX)
    calibrator = calibrate(
        small, q, act_scale_policy=policy, act_update_policy=update, momentum=0.75, batch_size=2
    )
    seen = seen_inputs(small, LAYERS, batch_size=2)
    layers = {layer.name: layer for layer in q.quantized_layers()}
    quantizer = UniformSymmetricQuantizer(6, scale_method=policy)
    for name in LAYERS:
        for i, (first, last) in enumerate(q.intervals):
            clips = [31 * quantizer.scale(x).item() for t, x in seen[name] if first <= t <= last]
            assert len(clips) == 4  # two batches, two steps each
            expected = clips[0]
            for clip in clips[1:]:
                expected = max(expected, clip) if update == "maximum" else 0.75 * expected + 0.25 * clip
            # The search over a histogram and the one over the tensor have other bins.
            found = 31 * layers[name].act_scale[i].item()
            assert found == pytest.approx(expected, rel=1e-6 if policy == "max" else 0.06)
            values = torch.cat([x.flatten() for t, x in seen[name] if first <= t <= last])
            share = (values.abs() > found).float().mean().item()
            assert layers[name].act_clipped[i].item() == pytest.approx(share, abs=2e-3)
    assert q.calibrated
    ranges = calibrator.ranges
    for name in LAYERS:
        rows = ranges[ranges.layer == name]
        assert rows.timestep.tolist() == [t for t, _ in seen[name]]
        assert np.allclose(rows.maximum, [x.abs().max().item() for _, x in seen[name]])


@pytest.mark.parametrize("given, rows", [({}, 2), ({"batch_size": 3}, 3)])
def test_calibration_takes_no_more_images_at_a_time_than_generating(small, monkeypatch, given, rows):
    monkeypatch.setattr(type(small), "batch_size", property(lambda sd: 2))
    q, seen = QuantModel(small.unet), []
    q.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calibrate(small, q, steps=1, **given)
    # Each prompt counts once, so the last batch may be smaller.
    assert max(seen) == 2 * rows and sum(seen) == 2 * len(PROMPTS) and q.calibration["batch_size"] == rows
    calibrate(small, q, steps=1, prompts=PROMPTS[:1])
    assert q.calibration["batch_size"] == 1


def test_calibration_keeps_no_rounded_weights(small):
    q = QuantModel(small.unet)
    kept = []
    q.module.register_forward_hook(lambda *_: kept.append(weakref.ref(q.quantized_layers()[0].fake_weight())))
    calibrate(small, q, steps=2, quantized_inputs=True)
    assert kept and all(weight() is None for weight in kept)


def test_one_interval_is_the_plain_model(small):
    for boundaries, policy in (("uniform", "max"), ("optimal", "mse")):
        plain = QuantModel(small.unet, act_quant_params=SIX)
        aware = TimeStepCalibratedQuantModel(
            small.unet, timesteps=4, k=1, boundaries=boundaries, act_quant_params=SIX
        )
        for q in (plain, aware):
            calibrate(small, q, steps=3, act_scale_policy=policy, act_update_policy="momentum")
        assert equal(plain, aware) and plain.intervals == aware.intervals == [(0, 999)]
        images = [small.replace(unet=q).generate(PROMPTS, steps=1, seed=1) for q in (plain, aware)]
        assert torch.equal(*images)
        assert describe(plain).act_clipped.equals(describe(aware).act_clipped)


def test_forty_ddpm_steps_serve_twenty_of_ddim(small):
    q = TimeStepCalibratedQuantModel(small.unet, timesteps=40, k=20)
    assert Calibrator(small, q).calibrate(PROMPTS[:1], sampler="ddpm", guidance_scale=1) is q
    assert q.calibration["steps"] == 40
    plain = small.generate(PROMPTS, steps=20, sampler="ddim")
    for settings in ({"steps": 20, "sampler": "ddim"}, {"steps": 7, "sampler": "dpmpp_2m"}):
        images = small.replace(unet=q).generate(PROMPTS, **settings)
        assert images.isfinite().all() and images.shape == plain.shape
    again = small.replace(unet=q).generate(PROMPTS, steps=5, image=plain, strength=0.5)
    assert again.isfinite().all()


def test_the_same_arguments_give_the_same_scales_and_switches_stay(small):
    models = [QuantModel(small.unet).set_use_quant(weights=i == 1) for i in range(2)]
    for i, q in enumerate(models):
        calibrate(small, q, seed=3)
        assert (q.state.weights, q.state.activations) == (i == 1, True)
    assert equal(*models)
    assert not equal(models[0], calibrate(small, QuantModel(small.unet), seed=4).model)
    assert models[0].state.observer is None


def test_later_layers_may_see_quantized_inputs(small):
    first = small.unet.input_blocks[0][0]
    narrow = {"weight_quant_params": {"n_bits": 3}, "act_quant_params": {"n_bits": 3}}
    plain, quantized = QuantModel(small.unet, **narrow), QuantModel(small.unet, **narrow)
    calibrate(small, plain, steps=1, prompts=PROMPTS[:1])
    calibrate(small, quantized, steps=1, prompts=PROMPTS[:1], quantized_inputs=True)
    # The first layer has nothing before it; what the next one sees is the quantized first one's.
    by_name = [{layer.name: layer.act_scale for layer in q.quantized_layers()} for q in (plain, quantized)]
    assert torch.equal(by_name[0]["input_blocks.0.0"], by_name[1]["input_blocks.0.0"])
    assert not equal(plain, quantized)
    seen = []
    hooked = (
        quantized.module.input_blocks[1][0]
        .in_layers[2]
        .register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().max().item()))
    )
    # The same step again, now with the scales that were found.
    small.replace(unet=quantized).generate(
        PROMPTS[:1], steps=1, sampler="ddpm", guidance_scale=3.0, batch_size=1
    )
    hooked.remove()
    assert seen[0] / 3 == pytest.approx(by_name[1]["input_blocks.1.0.in_layers.2"].item(), rel=1e-5)
    assert first.weight.equal(small.unet.input_blocks[0][0].weight)


def test_halves_are_calibrated_apart(small):
    q = QuantModel(small.unet, split_shortcuts=True)
    calibrator = calibrate(small, q)
    name = "output_blocks.0.0.skip_connection"
    split = small.unet.shortcut_splits()[name]
    inputs = [x for _, x in seen_inputs(small, [name])[name]]
    tops = [max(x[:, part].abs().max().item() for x in inputs) for part in (slice(split), slice(split, None))]
    layer = next(layer for layer in q.quantized_layers() if layer.name == name)
    assert layer.act_scale.shape == (1, 2)
    assert (127 * layer.act_scale[0]).tolist() == pytest.approx(tops)
    assert set(calibrator.ranges.query("layer == @name").half) == {0, 1}


def test_an_interval_without_a_step_is_named_and_nothing_is_lost(small):
    q = TimeStepCalibratedQuantModel(small.unet, timesteps=8, k=8)
    with pytest.raises(CalibrationError, match="into timesteps 0 to 124, interval 0 of 8"):
        calibrate(small, q, steps=4)
    assert not q.calibrated and q.state.observer is None
    image = torch.rand(1, 3, 64, 64)
    with pytest.raises(CalibrationError, match="into timesteps 500 to 624, interval 4 of 8"):
        calibrate(small, q, steps=8, image=image, strength=0.5)
    calibrate(small, q, steps=8)
    before = [s.clone() for s in scales(q)]
    with pytest.raises(CalibrationError):
        calibrate(small, q, steps=2)
    assert q.calibrated and all(torch.equal(a, b) for a, b in zip(scales(q), before, strict=True))
    optimal = TimeStepCalibratedQuantModel(small.unet, timesteps=8, k=5, boundaries="optimal")
    with pytest.raises(
        CalibrationError, match="at least 5 different timesteps, and this calibration visited 2"
    ):
        calibrate(small, optimal, steps=2)
    assert optimal.intervals == TimeStepCalibratedQuantModel(small.unet, k=5).intervals


def test_layers_that_never_ran_are_named(small):
    class Half(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.spare = unet, nn.Linear(3, 3)

        def forward(self, latents, timesteps, context):
            return self.unet(latents, timesteps, context)

    q = QuantModel(Half(small.unet))
    with pytest.warns(UserWarning, match="1 layers did not run in every interval .*: spare"):
        calibrate(small, q, steps=1)
    with pytest.raises(NotCalibratedError, match="layer spare"):
        q.spare(torch.ones(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(small, QuantModel(small.unet), steps=1)


def test_weights_alone_need_no_calibration(small, monkeypatch):
    q = QuantModel(small.unet, act_quant_params=None)
    monkeypatch.setattr(type(small), "generate", lambda *a, **k: pytest.fail("generated"))
    assert Calibrator(small, q).calibrate(PROMPTS) is q


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"act_scale_policy": "mean"}, "'max' or 'mse'"),
        ({"act_update_policy": "last"}, "one of maximum, momentum, merged"),
        ({"momentum": 1}, "momentum must be"),
        ({"prompts": []}, "at least one prompt"),
        ({"sampler": "euler"}, "sampler must be"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_wrong_arguments_are_refused(small, wrong, message):
    with pytest.raises(ValueError, match=message):
        calibrate(small, QuantModel(small.unet), **wrong)


def test_the_scale_method_of_the_activations_is_the_default_policy(small):
    q = QuantModel(small.unet, act_quant_params={"n_bits": 4, "scale_method": "mse"})
    assert Calibrator(small, q).act_scale_policy == "mse"
    assert Calibrator(small, q, act_scale_policy="max").act_scale_policy == "max"
    with pytest.raises(TypeError, match="QuantModel, not UNet"):
        Calibrator(small, small.unet)


def test_activations_that_are_not_finite_name_the_layer(small):
    q = QuantModel(small.unet)
    with torch.no_grad():
        q.module.input_blocks[0][0].bias = nn.Parameter(torch.full((16,), torch.inf))
    with pytest.raises(CalibrationError, match=r"input of layer input_blocks\.1\..* not finite"):
        calibrate(small, q, steps=1)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_groups_are_the_best_of_all(k):
    costs = np.random.default_rng(k).random((7, 7)) * np.arange(1, 8)[None]
    costs[np.tril_indices(7, -1)] = np.inf

    def total(starts):
        return sum(costs[a, b - 1] for a, b in itertools.pairwise([*starts, 7]))

    every = [[0, *cuts] for cuts in itertools.combinations(range(1, 7), k - 1)]
    assert optimal_groups(costs, k) == min(every, key=total)
    with pytest.raises(ValueError, match="7 items cannot be cut into 8 groups"):
        optimal_groups(costs, 8)


@pytest.mark.parametrize("policy", ["max", "mse"])
def test_costs_of_groups_are_those_of_the_merged_values(policy):
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(20_000, generator=generator) * s for s in (0.3, 2.0, 1.1)]
    steps.append(torch.zeros(10))
    histograms = [Histogram.of(x) for x in steps]
    costs = group_costs(histograms, 7, policy)
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        merged = Histogram()
        for h in histograms[i : j + 1]:
            merged.add(h)
        step = max(merged.range(policy, 7)[1], 1e-9) / 7
        expected = 0.0
        for x in steps[i : min(j + 1, 3)]:
            error = (x / step).round().clamp(-7, 7) * step - x
            expected += (error.pow(2).mean() / x.pow(2).mean()).item()
        assert costs[i, j] == pytest.approx(expected, rel=0.05, abs=1e-9)
    assert np.isinf(costs[np.tril_indices(4, -1)]).all()


def test_boundaries_lie_where_the_range_changes():
    timesteps = [1, 101, 201, 301, 401, 501]
    widths = (0.1, 0.1, 1.0, 1.0, 1.0, 9.0)
    generator = torch.Generator().manual_seed(0)
    steps = [Histogram.of(torch.randn(5000, generator=generator) * w) for w in widths]
    for policy in ("max", "mse"):
        assert optimal_starts([(steps, 7)], timesteps, 3, policy) == [0, 151, 451]
        still = [Histogram.of(torch.randn(5000, generator=generator))] * 6
        assert optimal_starts([(still, 7), (steps, 3)], timesteps, 3, policy) == [0, 151, 451]


@pytest.mark.parametrize("quantized_inputs", [False, True])
def test_optimal_intervals_cover_the_steps(small, quantized_inputs):
    q = TimeStepCalibratedQuantModel(small.unet, timesteps=6, k=3, boundaries="optimal", act_quant_params=SIX)
    calibrator = calibrate(small, q, steps=6, act_scale_policy="mse", quantized_inputs=quantized_inputs)
    first, last = zip(*q.intervals, strict=True)
    assert first[0] == 0 and last[-1] == 999 and [f - 1 for f in first[1:]] == list(last[:-1])
    visited = sorted(set(calibrator.ranges.timestep))
    assert len(visited) == 6
    assert all(any(f <= t <= e for t in visited) for f, e in q.intervals)
    assert all((layer.act_scale > 0).all() for layer in q.quantized_layers())
    small.replace(unet=q).generate(PROMPTS, steps=3)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A calibrated model with everything that is saved at other than its default, and its folder."""
    q = TimeStepCalibratedQuantModel(
        small.unet, timesteps=6, k=3, boundaries="optimal", timestep_arg="timesteps",
        weight_quant_params={"n_bits": 5, "scale_method": "mse"}, act_quant_params=SIX,
        quant_filters=["*.to_v"], split_shortcuts=True,
    )  # fmt: skip
    calibrate(small, q, steps=6, act_scale_policy="mse", seed=range(3))
    return q, save_quant_model(q, tmp_path_factory.mktemp("saved") / "deep" / "folder")


def test_what_was_saved_computes_the_same(small, saved):
    q, folder = saved
    loaded = load_quant_model(folder, small.unet)
    assert type(loaded) is type(q) and loaded.calibrated
    assert loaded.intervals == q.intervals != TimeStepCalibratedQuantModel(small.unet, k=3).intervals
    assert describe(loaded).equals(describe(q))
    assert {p.name for p in folder.iterdir()} == {"quantization.json", "quantization.safetensors"}
    images = [small.replace(unet=m).generate(PROMPTS, steps=3) for m in (q, loaded)]
    assert torch.equal(*images)
    # Switches too, and a plain model.
    plain = calibrate(small, QuantModel(small.unet, quant_filters="published"), steps=1).model
    plain.set_use_quant(weights=False)
    loaded = load_quant_model(save_quant_model(plain, folder.parent / "plain"), small.unet)
    assert torch.equal(*[small.replace(unet=m).generate(PROMPTS, steps=1) for m in (plain, loaded)])
    assert loaded.left_out == plain.left_out


@pytest.mark.slow
def test_what_was_saved_computes_the_same_in_a_new_process(saved, tmp_path):
    q, folder = saved
    script = (
        "import sys, torch; from conftest import SMALL, random_model; import sdcomp\n"
        "from sdcomp.quantization import load_quant_model\n"
        "sd = random_model(SMALL); q = load_quant_model(sys.argv[1], sd.unet)\n"
        "torch.save(sd.replace(unet=q).generate(['a blue circle'], steps=4), sys.argv[2])\n"
    )
    files = [str(folder), str(tmp_path / "images.pt")]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    subprocess.run([sys.executable, "-c", script, *files], check=True, env={**os.environ, "PYTHONPATH": path})
    from conftest import SMALL, random_model

    here = random_model(SMALL).replace(unet=q).generate(["a blue circle"], steps=4)
    assert torch.equal(torch.load(files[1]), here)


def test_damaged_and_foreign_files_are_refused(small, tiny, saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    config, weights = folder / "quantization.json", folder / "quantization.safetensors"
    with pytest.raises(QuantizationFileError, match="was made for another module|does not fit"):
        load_quant_model(folder, tiny.unet)
    text, raw = config.read_text(), weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(QuantizationFileError, match="is damaged"):
        load_quant_model(folder, small.unet)
    weights.write_bytes(raw)
    for change in ({"kind": "os.system"}, {"arguments": {"k": 99}}, {"arguments": {"bits": 3}}):
        config.write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(QuantizationFileError, match="does not fit"):
            load_quant_model(folder, small.unet)
    for broken in ("{", "[]", text[:50]):
        config.write_text(broken)
        with pytest.raises(QuantizationFileError):
            load_quant_model(folder, small.unet)
    config.unlink()
    with pytest.raises(QuantizationFileError, match="it has no quantization.json"):
        load_quant_model(folder, small.unet)
    with pytest.raises(QuantizationFileError, match="nowhere"):
        load_quant_model("nowhere", small.unet)
