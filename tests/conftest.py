"""Fixtures: small models with random weights, and diffusers if it is installed."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from sdcomp.model.clip import build_text_encoder
from sdcomp.model.config import TINY, ModelConfig, UNetConfig, VAEConfig
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.scenes import VOCABULARY
from sdcomp.training.caption_tokenizer import word_tokenizer

SMALL = dataclasses.replace(
    TINY,
    unet=UNetConfig(
        model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2,
        context_dim=32, norm_groups=8,
    ),
    vae=VAEConfig(base_channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4, latent_scale=0.7),
    text={**TINY.text, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
)  # fmt: skip
"""TINY's shapes outside, much narrower inside; with a latent scale, so that leaving it out is noticed."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU on machines without one; pytest lists them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


BITS = dataclasses.replace(
    TINY,
    vae=SMALL.vae,
    text={**SMALL.text, "max_position_embeddings": 77},
    unet=dataclasses.replace(TINY.unet, context_dim=32),
)
"""The tiny model's UNet between narrow other parts; prompts have the odd number of tokens of SD 1.x."""


def _randomize(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Set all weights and biases, also of norms, to random values that keep activations near `gain`.

    With activations far below 1, the constant that a norm adds to the variance matters too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(gain * noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(gain * 0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


def random_model(config: ModelConfig) -> StableDiffusion:
    """A model with random weights; its encoder has a narrow posterior, like a trained one."""
    encoder = _randomize(VAEEncoder(config.vae), 1)
    with torch.no_grad():
        z = config.vae.z_channels
        encoder.quant_conv.weight[z:] *= 0.1
        encoder.quant_conv.bias[z:] -= 8
    vocab, merges = word_tokenizer(VOCABULARY)
    length = config.text["max_position_embeddings"]
    return StableDiffusion(
        config=config,
        unet=_randomize(UNet(config.unet), 0),
        encoder=encoder,
        decoder=_randomize(VAEDecoder(config.vae), 2),
        text_encoder=_randomize(build_text_encoder(config), 3),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length),
    )


def without_zeros(module: nn.Module) -> nn.Module:
    """Set a module's zeros to 0.001 in place: initial biases, and one random draw in 16 million."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[parameter == 0] = 1e-3
    return module


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """A function that gives a module random weights from a seed."""
    return _randomize


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """Run the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> StableDiffusion:
    """A model of a few ten thousand weights."""
    return random_model(SMALL)


@pytest.fixture(scope="session")
def tiny() -> StableDiffusion:
    """A model of the tiny model's size, with channels-last weights."""
    sd = random_model(TINY)
    for part in (sd.unet, sd.encoder, sd.decoder, sd.text_encoder):
        part.to(memory_format=torch.channels_last)
    return sd


@pytest.fixture(scope="session")
def diffusers():
    """diffusers, the independent implementation that ours is compared with."""
    return pytest.importorskip("diffusers")
