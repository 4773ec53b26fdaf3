"""The autoencoder against diffusers' `AutoencoderKL` with the same weights."""

import dataclasses

import pytest
import torch
from diffusers_keys import diffusers_vae, vae_state

from sdcomp.model.config import SD15, TINY, VAEConfig
from sdcomp.model.vae import VAEDecoder, VAEEncoder

CONFIGS = {
    "tiny": TINY.vae,
    "sd_like": dataclasses.replace(SD15.vae, base_channels=8, norm_groups=4),
}


@pytest.fixture(params=[(name, gain) for name in CONFIGS for gain in (1.0, 0.05)], ids=str)
def pair(request, diffusers, randomize):
    """Our encoder and decoder, and diffusers' autoencoder with their weights."""
    name, gain = request.param
    config = CONFIGS[name]
    encoder, decoder = randomize(VAEEncoder(config), 1, gain), randomize(VAEDecoder(config), 2, gain)
    theirs = diffusers_vae(diffusers, config)
    theirs.load_state_dict(vae_state(encoder, decoder), strict=True)
    return encoder, decoder, theirs


def random_images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert output.shape == expected.shape
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_encoder_moments_agree_with_diffusers(pair):
    encoder, _, theirs = pair
    mean, logvar = encoder(random_images())
    posterior = theirs.encode(random_images()).latent_dist
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    factor = encoder.config.downsampling
    assert mean.shape == (2, 4, 32 // factor, 48 // factor)


@torch.inference_mode()
def test_decoder_output_agrees_with_diffusers(pair):
    _, decoder, theirs = pair
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(6))
    assert_close(decoder(latents), theirs.decode(latents).sample)


@torch.inference_mode()
def test_log_variances_stay_in_the_range_of_diffusers(pair):
    encoder, decoder, theirs = pair
    encoder.quant_conv.bias[-4:] += torch.tensor([100.0, -100.0, 20.0, -30.0])
    theirs.load_state_dict(vae_state(encoder, decoder), strict=True)
    logvar = encoder(random_images())[1]
    assert_close(logvar, theirs.encode(random_images()).latent_dist.logvar)
    assert logvar.min() == -30 and logvar.max() == 20


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_an_image_is_the_same_wherever_it_stands_in_the_batch(randomize, memory_format):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(6)).repeat(3, 1, 1, 1)
    images = randomize(VAEDecoder(TINY.vae), 2).to(memory_format=memory_format)(latents)
    assert torch.equal(images[1], images[0]) and torch.equal(images[2], images[0])
    means, _ = randomize(VAEEncoder(TINY.vae), 1).to(memory_format=memory_format)(images)
    assert torch.equal(means[1], means[0]) and torch.equal(means[2], means[0])


def test_sd15_has_the_published_parameters(diffusers):
    with torch.device("meta"):
        encoder, decoder = VAEEncoder(SD15.vae), VAEDecoder(SD15.vae)
        theirs = diffusers_vae(diffusers, SD15.vae)
    state = {name: tuple(value.shape) for name, value in vae_state(encoder, decoder).items()}
    assert state == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}


def test_sd15_has_the_published_size_and_names():
    with torch.device("meta"):
        encoder, decoder = VAEEncoder(SD15.vae), VAEDecoder(SD15.vae)
    state = {**encoder.state_dict(), **decoder.state_dict()}
    assert sum(value.numel() for value in state.values()) == 83_653_863
    assert len(state) == 248
    published = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in published} == published


def test_downsampling_counts_the_levels():
    assert VAEConfig().downsampling == 8
    assert TINY.vae.downsampling == 4
