"""The noise schedule and the samplers, step by step against diffusers' schedulers."""

import numpy as np
import pytest
import torch
from diffusers_keys import BETAS, diffusers_scheduler

from sdcomp.errors import UserError
from sdcomp.model.config import ScheduleConfig
from sdcomp.model.samplers import SAMPLERS, make_sampler
from sdcomp.model.schedule import NoiseSchedule

SPACINGS = ("leading", "trailing")

# diffusers does not yet convert tensors to arrays as NumPy 2 wants it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def schedule(spacing: str) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig(timestep_spacing=spacing))


def random_path(steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Initial latents, and a noise prediction and a noise draw for each step."""
    generator = torch.Generator().manual_seed(steps)
    draws = torch.randn(2 * steps + 1, 2, 4, 8, 8, generator=generator)
    return draws[0], draws[1 : steps + 1], draws[steps + 1 :]


def worst_difference(diffusers, monkeypatch, name: str, spacing: str, steps: int, first: int) -> float:
    """The largest difference along both paths, relative to the largest latent of its step."""
    ours = make_sampler(name, schedule(spacing), steps)
    theirs = diffusers_scheduler(diffusers, name, spacing, steps)
    latents, predictions, noises = random_path(steps)
    expected, worst = latents, 0.0
    for i in range(first, steps):
        with monkeypatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noises[i])  # noqa: B023
            expected = theirs.step(predictions[i], theirs.timesteps[i], expected).prev_sample
        latents = ours.step(i, latents, predictions[i], noises[i])
        assert latents.dtype == torch.float32
        worst = max(worst, float((latents - expected).abs().max() / expected.abs().max()))
    return worst


def test_the_schedule_agrees_with_diffusers(diffusers):
    theirs = diffusers.DDPMScheduler(**BETAS)
    ours = schedule("leading")
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = theirs.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours.add_noise(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-6)


def test_snr_falls_from_the_first_timestep_to_the_last_as_published():
    # SD 1.x: cumulative products 0.99915 and 0.00466 at the two ends (its checkpoints hold them).
    snr = schedule("leading").snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    assert snr[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-4)
    assert snr[-1].item() == pytest.approx(0.0046600 / 0.99534, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.* spacing start at timestep:UserWarning")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_agree_with_diffusers_for_any_number_of_steps(diffusers, name, spacing):
    for steps in range(1, 501):
        ours = make_sampler(name, schedule(spacing), steps).timesteps
        theirs = diffusers_scheduler(diffusers, name, spacing, steps).timesteps.tolist()
        # For some numbers of steps, rounding makes diffusers append a timestep of -1.
        assert ours == [t for t in theirs if t >= 0], steps
        assert len(ours) == steps
        assert all(type(t) is int for t in ours)


@pytest.mark.parametrize("steps", [1, 2, 20, 30, 40, 50, 70])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_agrees_with_diffusers(diffusers, monkeypatch, name, spacing, steps):
    assert worst_difference(diffusers, monkeypatch, name, spacing, steps, first=0) < 1e-5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_late_start_agrees_with_diffusers(diffusers, monkeypatch, name, spacing):
    assert worst_difference(diffusers, monkeypatch, name, spacing, steps=30, first=11) < 1e-5


def test_a_sampler_used_again_starts_without_history():
    latents, predictions, _ = random_path(10)

    def run(sampler, first):
        x = latents
        for i in range(first, 10):
            x = sampler.step(i, x, predictions[i])
        return x

    for first in (0, 4):
        once = make_sampler("dpmpp_2m", schedule("trailing"), 10)
        torch.testing.assert_close(run(once, first), run(once, first), rtol=0, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_true_noise_leads_back_to_the_image(name, spacing):
    levels = schedule(spacing)
    sampler = make_sampler(name, levels, 25)
    image, latents, *draws = torch.randn(27, 1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    start = levels.alphas_cumprod[sampler.timesteps[0]]
    latents = start.sqrt() * image + (1 - start).sqrt() * latents
    for i, t in enumerate(sampler.timesteps):
        a = levels.alphas_cumprod[t]
        latents = sampler.step(i, latents, (latents - a.sqrt() * image) / (1 - a).sqrt(), draws[i])
    # DDIM ends at the noise level of the first timestep, a standard deviation of 0.029.
    tolerance = 0.15 if name == "ddim" else 1e-3
    torch.testing.assert_close(latents, image, rtol=0, atol=tolerance)


def test_an_unknown_sampler_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="^sampler must be one of ddpm, ddim, dpmpp_2m, not 'euler'$"):
        make_sampler("euler", schedule("leading"), 20)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(UserError, match="timestep_spacing"):
        schedule("linspace")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 0), ("leading", 501), ("trailing", 1001), ("trailing", -5)]
)
def test_steps_that_the_schedule_cannot_give_are_refused(name, spacing, steps):
    with pytest.raises(ValueError, match=rf"^steps must be 1 to (500|1000), not {steps}$"):
        make_sampler(name, schedule(spacing), steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [True, 20.0, 2.5, "20", None, float("nan")])
def test_steps_must_be_a_whole_number(name, steps):
    with pytest.raises(TypeError, match="^steps must be a whole number, not "):
        make_sampler(name, schedule("leading"), steps)


def test_steps_may_be_a_numpy_integer():
    assert make_sampler("ddim", schedule("trailing"), np.int64(4)).timesteps == [999, 749, 499, 249]
