"""Errors of noise predictions against known ones."""

import pytest
import torch
from diffusers_keys import diffusers_scheduler
from torch import nn

from sdcomp.evaluation import (
    branch_errors,
    cached_trace,
    noise_mse,
    path_predictions,
    step_weights,
)
from sdcomp.model.config import ScheduleConfig
from sdcomp.model.samplers import SAMPLERS
from sdcomp.model.schedule import NoiseSchedule


class Off(nn.Module):
    """The UNet with a constant added to its prediction, the same for prompts and negative prompts."""

    def __init__(self, unet, error):
        super().__init__()
        self.unet, self.error = unet, error

    def forward(self, latents, timesteps, context):
        return self.unet(latents, timesteps, context) + self.error * timesteps / 1000


def test_noise_errors_are_measured_step_by_step(small, tmp_path):
    prompts = ["a small red star", "a ring", "two stars"]
    settings = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2, "seed": 1}
    trace = cached_trace(small, prompts, folder=tmp_path, **settings)
    again = cached_trace(small, prompts, folder=tmp_path, **settings)
    assert torch.equal(trace.latents, again.latents) and torch.equal(trace.timesteps, again.timesteps)

    def errors(unet, **changes):
        return noise_mse(small, unet, prompts, trace, **{"guidance_scale": 3.0, "batch_size": 2, **changes})

    assert errors(small.unet).shape == (4, 3)
    # Here the last batch is not padded, so other kernels round it in another way.
    assert errors(small.unet).max() < 1e-9
    expected = (0.1 * trace.timesteps / 1000).square()[:, None].expand(4, 3)
    assert torch.allclose(errors(Off(small.unet, 0.1)), expected, rtol=1e-3)
    assert errors(small.unet, guidance_scale=1.0).min() > 1e-6
    assert errors(small.unet, negative_prompt="a red ring").min() > 1e-8


class OffForPrompts(Off):
    """The error is that of the second half of the rows, which are the prompts of a guided step."""

    def forward(self, latents, timesteps, context):
        found = self.unet(latents, timesteps, context)
        found[len(found) // 2 :] += self.error
        return found


def test_errors_of_branches_are_told_apart(small, tmp_path):
    prompts = ["a small red star", "a ring", "two stars"]
    settings = {"guidance_scale": 3.0, "batch_size": 2}
    trace = cached_trace(small, prompts, folder=tmp_path, steps=4, seed=1, **settings)

    def found(unet, **changes):
        return path_predictions(small, unet, prompts, trace, **settings | changes)

    whole = found(small.unet)
    assert whole.shape == (2, *trace.latents.shape)
    errors = branch_errors(found(OffForPrompts(small.unet, 0.1)), whole, 3.0)
    assert {name: values.shape for name, values in errors.items()} == dict.fromkeys(
        ("guided", "negative prompt", "prompt"), (4, 3)
    )
    # Guidance multiplies the error of the prompt's branch by its scale.
    assert errors["prompt"].numpy() == pytest.approx(0.01, rel=1e-4)
    assert errors["guided"].numpy() == pytest.approx(0.09, rel=1e-4)
    assert errors["negative prompt"].max() == 0
    # Without guidance there is one branch, and the guided prediction is its own.
    alone = branch_errors(found(Off(small.unet, 0.1), guidance_scale=1.0), whole[1:], 1.0)
    expected = (0.1 * trace.timesteps / 1000).square()[:, None].expand(4, 3)
    assert list(alone) == ["guided"] and torch.allclose(alone["guided"], expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("visited", [10, 6])
def test_the_weight_of_a_step_is_how_far_its_error_moves_the_final_latents(
    diffusers, monkeypatch, name, visited
):
    weights = step_weights(name, NoiseSchedule(ScheduleConfig()), 10, visited)
    assert weights.shape == (visited,)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(10, 1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def end(error_at=None):
        scheduler = diffusers_scheduler(diffusers, name, "leading", 10)
        latents = torch.ones(1, 4, 8, 8, dtype=torch.float64)
        for i in range(10 - visited, 10):
            found = predictions[i] + (0.5 if i == error_at else 0)
            latents = scheduler.step(found, scheduler.timesteps[i], latents).prev_sample
        return latents

    moved = [(end(i) - end()).mean().item() / 0.5 for i in range(10 - visited, 10)]
    assert weights.tolist() == pytest.approx(moved, rel=1e-4)
