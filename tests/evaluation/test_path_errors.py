"""Errors along the sampling path, against errors that are known and against layers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdcomp.evaluation import layer_errors, noise_mse, output_errors, path_errors, thinned
from sdcomp.quantization import QuantModel, TimeStepCalibratedQuantModel

PROMPTS = ["a small red star", "a ring", "two stars"]
GUIDED = {"guidance_scale": 3.0, "batch_size": 2}


class Louder(nn.Module):
    """The UNet with its prediction times a factor."""

    def __init__(self, unet, factor):
        super().__init__()
        self.unet, self.factor = unet, factor

    def forward(self, latents, timesteps, context):
        return self.factor * self.unet(latents, timesteps, context)


def generate(sd, unet, **settings):
    """The trace of a generation, and the latents that the decoder was given."""
    decoded = []
    handle = sd.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0].clone()))
    try:
        trace = sd.replace(unet=unet).generate(PROMPTS, trace=True, **settings)[1]
    finally:
        handle.remove()
    # The last batch of generate is filled up.
    return trace, torch.cat(decoded)[: len(PROMPTS)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_louder_prediction_has_its_gain_and_leads_where_generate_says(small, sampler):
    settings = {"steps": 4, "sampler": sampler, "seed": 1, **GUIDED}
    trace, wanted = generate(small, small.unet, **settings)
    unet = Louder(small.unet, 1.25)
    found = path_errors(small, unet, PROMPTS, trace, **settings)
    assert torch.allclose(found.gain, torch.full((4, 3), 0.25), atol=1e-4)
    expected = (0.25 * trace.noise_predictions).square().mean((2, 3, 4))
    assert torch.allclose(found.step, expected, rtol=1e-3)
    assert torch.equal(found.step, noise_mse(small, unet, PROMPTS, trace, **GUIDED))
    ended = generate(small, unet, **settings)[1]
    expected = (ended - wanted).square().sum((1, 2, 3)) / wanted.square().sum((1, 2, 3))
    assert found.final.shape == (3,) and torch.allclose(found.final, expected, rtol=1e-3)


def test_the_unet_itself_has_no_error(small):
    settings = {"steps": 3, "seed": 2, **GUIDED}
    trace = generate(small, small.unet, **settings)[0]
    found = path_errors(small, small.unet, PROMPTS, trace, **settings)
    assert found.step.max() < 1e-9 and found.gain.abs().max() < 1e-4 and found.final.max() < 1e-9


def test_a_thinned_trace_has_fewer_images_and_steps(small):
    trace = generate(small, small.unet, steps=5, seed=0, **GUIDED)[0]
    found = thinned(trace, 2, 2)
    assert found.timesteps.tolist() == trace.timesteps.tolist()[::2]
    assert torch.equal(found.latents, trace.latents[[0, 2, 4], :2])
    assert torch.equal(found.noise_predictions, trace.noise_predictions[[0, 2, 4], :2])
    errors = noise_mse(small, small.unet, PROMPTS[:2], found, **GUIDED)
    assert errors.shape == (3, 2) and errors.max() < 1e-9


@pytest.fixture(scope="module")
def seen(small):
    """A trace of two steps, and a model with 3-bit weights and inputs of one range for each token."""
    trace = thinned(generate(small, small.unet, steps=2, seed=0, **GUIDED)[0], 2)
    model = QuantModel(
        small.unet,
        weight_quant_params={"n_bits": 3},
        act_quant_params={"n_bits": 4, "granularity": "token"},
    )
    return trace, model


def test_the_error_of_a_layer_is_that_of_a_model_with_no_other_layer_quantized(small, seen):
    trace, model = seen
    names = [layer.name for layer in model.quantized_layers()]
    found = layer_errors(small, model, PROMPTS[:2], trace, names[2:4], **GUIDED)
    assert list(found) == names[2:4] and model.state.only is None
    for name, error in found.items():
        alone = QuantModel(
            small.unet,
            weight_quant_params={"n_bits": 3},
            act_quant_params={"n_bits": 4, "granularity": "token"},
            quant_filters=[other for other in names if other != name],
        )
        wanted = noise_mse(small, alone, PROMPTS[:2], trace, **GUIDED).mean().item()
        assert error == pytest.approx(wanted, rel=1e-4) and error > 0


def test_the_error_of_an_output_is_that_of_the_layer_by_hand(small, seen):
    trace, model = seen
    found = output_errors(small, model, PROMPTS[:2], trace, **GUIDED)
    assert (model.state.weights, model.state.activations) == (True, True)
    assert not any(layer._forward_hooks for layer in model.quantized_layers())
    inputs: dict[str, list] = {}
    linear = {n: m for n, m in small.unet.named_modules() if isinstance(m, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
        for name, layer in linear.items()
    ]
    noise_mse(small, small.unet, PROMPTS[:2], trace, **GUIDED)
    for handle in handles:
        handle.remove()
    assert found.keys() > linear.keys()
    for name, layer in linear.items():
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]])
        step = layer.weight.abs().amax(1, keepdim=True) / 3
        weight = (layer.weight / step).round().clamp(-3, 3) * step
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
        rounded = (x / scale).round() * scale
        change = rounded @ weight.T - x @ layer.weight.T
        bias = 0 if layer.bias is None else layer.bias
        whole = (x @ layer.weight.T + bias).square().sum()
        assert found[name] == pytest.approx((change.square().sum() / whole).item(), rel=0.02), name


def test_switches_stay_as_they_were(small, seen):
    trace, model = seen
    model.set_use_quant(weights=True, activations=False)
    weights = output_errors(small, model, PROMPTS[:2], trace, **GUIDED)
    assert (model.state.weights, model.state.activations) == (True, False)
    model.set_use_quant()
    both = output_errors(small, model, PROMPTS[:2], trace, **GUIDED)
    assert sum(weights.values()) < sum(both.values())


def test_another_number_of_prompts_is_refused(small, seen):
    with pytest.raises(ValueError, match="3 prompts for a trace of 2 images"):
        output_errors(small, seen[1], PROMPTS, seen[0])


def test_each_timestep_interval_has_its_own_grid(small):
    trace = thinned(generate(small, small.unet, steps=2, seed=0, **GUIDED)[0], 2)
    model = TimeStepCalibratedQuantModel(
        small.unet, timesteps=2, k=2, weight_quant_params=None, act_quant_params={"n_bits": 8}
    )
    for layer in model.quantized_layers():
        # Fine steps at high noise, and a coarse grid at low noise.
        layer.set_act_scales(torch.tensor([1e3, 1e-1]), torch.zeros(2))
    model.is_calibrated.fill_(True)
    late = output_errors(small, model, PROMPTS[:2], thinned(trace, 2, 2), **GUIDED)
    both = output_errors(small, model, PROMPTS[:2], trace, **GUIDED)
    assert sum(late.values()) < 0.5 * sum(both.values())
