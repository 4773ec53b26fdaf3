"""Generation against diffusers' pipelines, and the promises of `generate`."""

import copy
import dataclasses

import pytest
import torch
from diffusers_keys import diffusers_scheduler, diffusers_unet, diffusers_vae, unet_state, vae_state
from torch import nn

from sdcomp.errors import NonFiniteError
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.model.samplers import SAMPLERS, make_sampler

# diffusers does not yet convert tensors to arrays as NumPy 2 wants it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RED = "a small red star on a navy background"
BLUE = "a large striped blue circle above a small green square"
NOISY = "an unseen word: zebra!"


def with_spacing(sd: StableDiffusion, spacing: str) -> StableDiffusion:
    schedule = dataclasses.replace(sd.config.schedule, timestep_spacing=spacing)
    return sd.replace(config=dataclasses.replace(sd.config, schedule=schedule))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline(diffusers, kind: str, sd: StableDiffusion, sampler: str):
    """diffusers' pipeline of that kind with the weights, tokenizer and sampler of `sd`."""
    unet = diffusers_unet(diffusers, sd.config.unet)
    unet.load_state_dict(unet_state(sd.unet))
    vae = diffusers_vae(diffusers, sd.config.vae)
    vae.load_state_dict(vae_state(sd.encoder, sd.decoder))
    made = getattr(diffusers, kind)(
        unet=unet,
        vae=vae,
        text_encoder=sd.text_encoder,
        tokenizer=sd.tokenizer,
        scheduler=diffusers_scheduler(diffusers, sampler, sd.config.schedule.timestep_spacing),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def assert_same_images(images: torch.Tensor, expected: torch.Tensor) -> None:
    assert images.shape == expected.shape and images.dtype == torch.float32
    # Clipped pixels would agree for any latents.
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.5
    assert (images - expected).abs().max() < 1e-4


class Recorder(nn.Module):
    """A UNet that records its calls."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.rows: list[int] = []
        self.timesteps: list[int] = []
        self.grad: list[bool] = []

    def forward(self, latents, timesteps, context):
        self.rows.append(len(latents))
        self.timesteps.append(timesteps)
        self.grad.append(torch.is_grad_enabled())
        assert latents.shape[0] == context.shape[0]
        return self.unet(latents, timesteps, context)


# Parity


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image_agrees_with_diffusers(diffusers, small, sampler, spacing):
    sd = with_spacing(small, spacing)
    images = sd.generate(
        [RED, NOISY],
        negative_prompt=BLUE,
        steps=6,
        sampler=sampler,
        guidance_scale=3.0,
        seed=[5, 6],
        batch_size=2,
    )
    expected = pipeline(diffusers, "StableDiffusionPipeline", sd, sampler)(
        [RED, NOISY],
        negative_prompt=[BLUE, BLUE],
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=generators(5, 6),
        output_type="pt",
    ).images
    assert_same_images(images, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_text_to_image_of_the_tiny_models_size_agrees_with_diffusers(diffusers, tiny, guidance_scale):
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=g) for g in generators(5, 6)])
    images = tiny.generate([RED, BLUE], steps=3, guidance_scale=guidance_scale, seed=[5, 6], batch_size=2)
    expected = pipeline(diffusers, "StableDiffusionPipeline", tiny, "ddim")(
        [RED, BLUE],
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        latents=latents,
        output_type="pt",
    ).images
    assert_same_images(images, expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_agrees_with_diffusers(diffusers, small, sampler, spacing):
    sd = with_spacing(small, spacing)
    image = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    images = sd.generate(
        [RED, BLUE],
        image=image,
        strength=0.65,
        steps=10,
        sampler=sampler,
        guidance_scale=3.0,
        seed=[8, 9],
        batch_size=2,
    )
    expected = pipeline(diffusers, "StableDiffusionImg2ImgPipeline", sd, sampler)(
        [RED, BLUE],
        image=image,
        strength=0.65,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=generators(8, 9),
        output_type="pt",
    ).images
    assert_same_images(images, expected)


def test_recorded_noise_predictions_lead_to_the_image(diffusers, small):
    images, trace = small.generate([RED, BLUE], steps=5, sampler="dpmpp_2m", batch_size=2, trace=True)
    scheduler = diffusers_scheduler(diffusers, "dpmpp_2m", "trailing", 5)
    latents = trace.latents[0]
    for i, t in enumerate(trace.timesteps):
        torch.testing.assert_close(trace.latents[i], latents, rtol=1e-4, atol=1e-4)
        latents = scheduler.step(trace.noise_predictions[i], t, latents).prev_sample
    torch.testing.assert_close(small.decode_latents(latents), images, rtol=0, atol=1e-4)


# An image depends only on its own row


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_wherever_its_prompt_stands(small, sampler, guidance_scale):
    def generate(prompts):
        return small.generate(prompts, steps=3, sampler=sampler, guidance_scale=guidance_scale, batch_size=3)

    alone = generate(RED)[0]
    others = [BLUE, NOISY, "a", ""]
    for position in range(5):
        images = generate([*others[:position], RED, *others[position:]])
        assert torch.equal(images[position], alone), position


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_to_image_result_is_the_same_wherever_its_prompt_stands(small, sampler):
    sources = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    settings = {"steps": 6, "strength": 0.5, "sampler": sampler, "batch_size": 3}
    alone = small.generate(RED, image=sources[:1], **settings)[0]
    first = small.generate([RED, BLUE, NOISY, ""], image=sources, **settings)
    last = small.generate([BLUE, NOISY, "", RED], image=sources.roll(-1, 0), **settings)
    assert torch.equal(first[0], alone) and torch.equal(last[3], alone)
    assert not torch.equal(first[1], alone)


@pytest.mark.usefixtures("threads")
def test_an_image_of_the_tiny_models_size_is_the_same_wherever_its_prompt_stands(tiny):
    def generate(prompts):
        return tiny.generate(prompts, negative_prompt=NOISY, steps=1, batch_size=3)

    alone = generate(RED)[0]
    assert torch.equal(generate([RED, BLUE, NOISY])[0], alone)
    assert torch.equal(generate([BLUE, RED])[1], alone)
    assert torch.equal(generate([BLUE, NOISY, BLUE, RED])[3], alone)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_barely_depend_on_the_batch_size(small, sampler):
    one, two, four = (
        small.generate([RED, BLUE, NOISY], steps=3, sampler=sampler, batch_size=size) for size in (1, 2, 4)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
    torch.testing.assert_close(one, four, rtol=0, atol=1e-3)


def test_one_prompt_may_be_given_without_a_list(small):
    assert torch.equal(
        small.generate(RED, steps=1, batch_size=1), small.generate([RED], steps=1, batch_size=1)
    )


def test_negative_prompts_act_on_their_own_rows(small):
    settings = {"steps": 2, "batch_size": 2, "guidance_scale": 3.0}
    plain = small.generate([RED, BLUE], **settings)
    second = small.generate([RED, BLUE], negative_prompt=["", NOISY], **settings)
    both = small.generate([RED, BLUE], negative_prompt=NOISY, **settings)
    assert torch.equal(second[0], plain[0]) and not torch.equal(second[1], plain[1])
    assert torch.equal(second[1], both[1]) and not torch.equal(both[0], plain[0])


def test_no_prompts_give_no_images(small):
    assert small.generate([]).shape == (0, 3, 64, 64)
    assert small.generate([], size=(32, 48)).shape == (0, 3, 32, 48)
    assert small.generate([], image=torch.rand(1, 3, 32, 48)).shape == (0, 3, 32, 48)
    images, trace = small.generate([], steps=4, trace=True)
    assert images.shape == (0, 3, 64, 64)
    assert trace.timesteps.tolist() == [999, 749, 499, 249]
    assert trace.latents.shape == trace.noise_predictions.shape == (4, 0, 4, 16, 16)


def test_size_is_height_and_width(small):
    assert small.generate(RED, size=(32, 48), steps=1, batch_size=1).shape == (1, 3, 32, 48)


# How the UNet is called


@pytest.mark.parametrize(("guidance_scale", "rows"), [(3.0, 6), (0.0, 6), (1.0, 3)])
def test_the_unet_runs_once_a_step_with_full_batches_and_without_gradients(small, guidance_scale, rows):
    recorder = Recorder(small.unet)
    images = small.replace(unet=recorder).generate(
        [RED, BLUE, NOISY, ""], steps=4, guidance_scale=guidance_scale, batch_size=3
    )
    assert recorder.rows == [rows] * 8
    assert recorder.timesteps == [999, 749, 499, 249] * 2
    assert not any(recorder.grad)
    assert not images.is_inference() and not images.requires_grad and images.device.type == "cpu"


def test_a_guidance_scale_of_1_ignores_the_negative_prompt_and_0_the_prompt(small):
    settings = {"steps": 2, "batch_size": 1, "seed": [3]}
    one = small.generate(RED, guidance_scale=1, **settings)
    assert torch.equal(small.generate(RED, negative_prompt=BLUE, guidance_scale=1, **settings), one)
    zero = small.generate(BLUE, negative_prompt=RED, guidance_scale=0, **settings)
    torch.testing.assert_close(zero, one, rtol=0, atol=1e-3)


def test_guidance_is_the_models_own_by_default(small):
    own = small.generate(RED, steps=2, batch_size=1)
    assert torch.equal(small.generate(RED, steps=2, batch_size=1, guidance_scale=4.0), own)
    assert not torch.equal(small.generate(RED, steps=2, batch_size=1, guidance_scale=3.9), own)


# Trace


def test_a_trace_has_every_step_of_every_image_and_changes_no_image(small):
    settings = {"steps": 4, "guidance_scale": 1, "batch_size": 3}
    prompts = [RED, BLUE, NOISY, "a", ""]
    images, trace = small.generate(prompts, trace=True, **settings)
    assert torch.equal(small.generate(prompts, **settings), images)
    assert trace.timesteps.tolist() == [999, 749, 499, 249] and trace.timesteps.dtype == torch.int64
    assert trace.latents.shape == trace.noise_predictions.shape == (4, 5, 4, 16, 16)
    for row, prompt in enumerate(prompts):
        _, alone = small.generate(prompt, trace=True, **settings)
        assert torch.equal(trace.latents[:, row : row + 1], alone.latents)
        assert torch.equal(trace.noise_predictions[:, row : row + 1], alone.noise_predictions)


# Image to image


def test_a_low_strength_stays_near_the_autoencoders_reconstruction(small):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    round_trip = small.decode_latents(small.encode_images(image))
    distances = []
    for steps, strength in ((1000, 0.001), (100, 0.02), (10, 0.2)):
        result = small.generate(RED, image=image, steps=steps, strength=strength, batch_size=1)
        distances.append((result - round_trip).abs().mean())
    assert 0 < distances[0] < 0.03
    assert distances == sorted(distances) and distances[-1] > 0.1


@pytest.mark.parametrize(("strength", "timesteps"), [(1.0, 10), (1, 10), (0.55, 5), (0.1, 1), (0.01, 1)])
def test_strength_is_the_share_of_the_steps_that_run(small, strength, timesteps):
    settings = {"image": torch.rand(3, 64, 64), "steps": 10, "batch_size": 1, "trace": True}
    _, trace = small.generate(RED, strength=strength, **settings)
    assert trace.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99][-timesteps:]
    assert len(trace.latents) == timesteps


def test_one_image_serves_all_prompts(small):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    settings = {"steps": 4, "strength": 0.5, "batch_size": 2}
    shared = small.generate([RED, BLUE, NOISY], image=image, **settings)
    assert torch.equal(small.generate([RED, BLUE, NOISY], image=image.repeat(3, 1, 1, 1), **settings), shared)


def test_replace_shares_the_rest_and_leaves_the_model_as_it_was(small):
    other = nn.Identity()
    replaced = small.replace(unet=other)
    assert replaced.unet is other and small.unet is not other
    assert replaced.decoder is small.decoder and replaced.tokenizer is small.tokenizer


def test_replace_refuses_an_unknown_part_and_names_the_known_ones(small):
    with pytest.raises(TypeError, match="^a model has no part 'u_net'; it has config, unet, encoder, "):
        small.replace(u_net=small.unet)


def test_sampling_uses_a_replaced_schedule(small):
    _, trace = with_spacing(small, "leading").generate(RED, steps=4, batch_size=1, trace=True)
    assert trace.timesteps.tolist() == [751, 501, 251, 1]


# Warnings


def test_a_cut_prompt_gives_a_warning(small):
    with pytest.warns(UserWarning, match="1 of 3 prompts are cut: the text encoder reads 22 tokens") as found:
        small.generate([RED, "star " * 40], steps=1, batch_size=2)
    assert found[0].filename == __file__  # the caller's line, not one inside the package or PyTorch


def test_a_word_outside_the_captions_gives_a_warning(small):
    class Reader(nn.Module):
        """Replaces the scene reader, which only the tiny model has."""

    with pytest.warns(UserWarning, match="this model never learnt 'cat', 'on_a'") as found:
        small.replace(reader=Reader()).generate("A red cat on_a Navy background", steps=1, batch_size=1)
    assert found[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_captions_and_prompts_of_other_models_give_no_warning(small):
    small.generate([RED, "a cat"], steps=1, batch_size=2)
    small.replace(reader=nn.Identity()).generate([RED, BLUE.upper()], steps=1, batch_size=2)


@pytest.mark.parametrize("sampler, steps, first", [("ddim", 334, 667), ("dpmpp_2m", 500, 501)])
def test_a_start_far_from_pure_noise_gives_a_warning(small, sampler, steps, first):
    leading = with_spacing(small, "leading")
    message = f"{steps} steps with leading spacing start at timestep {first} of 1000, short of pure noise"
    with pytest.warns(UserWarning, match=message) as found:
        leading.generate([], sampler=sampler, steps=steps)
    assert found[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_usual_numbers_of_steps_give_no_warning(small, sampler):
    for steps in (1, 2, 5, 10, 20, 25, 30, 40, 50, 100):
        make_sampler(sampler, with_spacing(small, "leading").schedule, steps)


# Values that are not finite


class Broken(nn.Module):
    """A UNet that gives `value` for one of its rows at the given calls."""

    def __init__(self, unet: nn.Module, value: float, *calls: int) -> None:
        super().__init__()
        self.unet, self.value, self.calls, self.count = unet, value, calls, 0

    def forward(self, latents, timesteps, context):
        out = self.unet(latents, timesteps, context)
        if self.count in self.calls:
            out[-1, 0, 0, 0] = self.value
        self.count += 1
        return out


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_values_that_are_not_finite_is_an_error_that_names_it(small, sampler, value):
    broken = small.replace(unet=Broken(small.unet, value, 2))
    timestep = make_sampler(sampler, small.schedule, 5).timesteps[2]
    with pytest.raises(NonFiniteError, match=rf"^step 3 of 5 \(timestep {timestep}\) gives values that are"):
        broken.generate([RED, BLUE], steps=5, sampler=sampler, batch_size=2)


def test_a_decoder_with_values_that_are_not_finite_is_an_error(small):
    decoder = copy.deepcopy(small.decoder)
    decoder.decoder.conv_out.bias.data[1] = float("nan")
    with pytest.raises(NonFiniteError, match="^the VAE decoder, after the last step, gives values that are"):
        small.replace(decoder=decoder).generate(RED, steps=1, batch_size=1)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_stay_float32_around_a_unet_in_half_precision(small, dtype):
    half = copy.deepcopy(small).to(dtype)
    images, trace = half.generate([RED, BLUE], steps=4, batch_size=2, trace=True)
    exact = small.generate([RED, BLUE], steps=4, batch_size=2, trace=True)[1]
    # Latents in half precision would not change in a round trip through half precision.
    assert not torch.equal(trace.latents[2].to(dtype).float(), trace.latents[2])
    assert images.dtype == torch.float32
    error = (trace.latents[1] - exact.latents[1]).norm() / exact.latents[1].norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02), error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_added_with_float32_coefficients(small, dtype):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    zeros, t = torch.zeros_like(noise), torch.tensor([1])
    exact = small.schedule.add_noise(zeros, noise, t)
    found = small.schedule.add_noise(zeros.to(dtype), noise.to(dtype), t)
    assert found.dtype == dtype
    # Each value is rounded; a coefficient in float16 would make all of them 7 % too small.
    assert abs((found.float() * exact).sum() / exact.square().sum() - 1) < 1e-3
