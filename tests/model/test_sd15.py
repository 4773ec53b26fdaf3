"""Stable Diffusion 1.5 at full size, with random weights: exactness, memory, and round trips of files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sdcomp
from sdcomp.files import sha256
from sdcomp.model import SD15, StableDiffusion, UNet, VAEDecoder, VAEEncoder, load
from sdcomp.model.clip import build_text_encoder
from sdcomp.model.tokenizer import load_tokenizer, tokenize

pytestmark = pytest.mark.slow

PROMPTS = ["a photograph of an astronaut riding a horse"]
PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480


@pytest.fixture(scope="module")
def folder(randomize, tmp_path_factory) -> Path:
    """The same weights as single files (fp32 and fp16, and fp32 pickled) and as a diffusers folder."""
    folder = tmp_path_factory.mktemp("sd15")
    sd = StableDiffusion(
        config=SD15,
        unet=randomize(UNet(SD15.unet), 0),
        encoder=randomize(VAEEncoder(SD15.vae), 1),
        decoder=randomize(VAEDecoder(SD15.vae), 2),
        text_encoder=randomize(build_text_encoder(SD15), 3),
        tokenizer=load_tokenizer("data/clip_tokenizer", SD15),
    )
    with torch.no_grad():  # a trained encoder's posterior is narrow
        sd.encoder.quant_conv.weight[4:] *= 0.1
        sd.encoder.quant_conv.bias[4:] -= 8
    sdcomp.save(sd, folder / "model.safetensors")
    sdcomp.save(sd, folder / "half.safetensors", torch.float16)
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "model.ckpt")
    sdcomp.save(sd, folder / "diffusers", format="diffusers")
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> StableDiffusion:
    return load(folder / "model.safetensors")


@pytest.fixture(scope="module")
def theirs(folder, diffusers) -> Iterator:
    yield diffusers.StableDiffusionPipeline.from_pretrained(folder / "diffusers")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b).square().mean().log10()).item()


@torch.inference_mode()
def test_every_part_agrees_with_diffusers(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    ids = tokenize(ours.tokenizer, ["", *PROMPTS])
    assert torch.equal(
        ids, theirs.tokenizer(["", *PROMPTS], padding="max_length", return_tensors="pt").input_ids
    )
    context = ours.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(context, theirs.text_encoder(ids)[0], atol=1e-4, rtol=0)

    latents = torch.randn(2, 4, 32, 32, generator=generator)
    timesteps = torch.tensor([981, 21])
    expected = theirs.unet(latents, timesteps, context).sample
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(ours.unet(latents, timesteps, context), expected, atol=1e-4, rtol=0)

    images = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    mean, logvar = ours.encoder(images)
    expected = theirs.vae.encode(images).latent_dist
    torch.testing.assert_close(mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(logvar, expected.logvar, atol=1e-4, rtol=0)
    expected = theirs.vae.decode(latents[:1]).sample
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(ours.decoder(latents[:1]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_images_agree_with_diffusers(ours, theirs, diffusers, kind):
    options = {"num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    if kind == "text":
        expected = theirs(PROMPTS, height=256, width=256, generator=generator, **options).images
        images = ours.generate(PROMPTS, size=(256, 256), steps=10, seed=[3], batch_size=1)
    else:
        source = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
        pipe = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
        expected = pipe(PROMPTS, image=source, strength=0.8, generator=generator, **options).images
        images = ours.generate(PROMPTS, image=source, strength=0.8, steps=10, seed=[3], batch_size=1)
    assert images.shape == expected.shape == (1, 3, 256, 256)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.5
    print(f"\n{kind}-to-image: {psnr(images, expected):.1f} dB")
    assert psnr(images, expected) >= 60


def test_there_and_back_gives_the_same_bytes(ours, folder, theirs, tmp_path):
    expected = sha256(folder / "model.safetensors")
    assert sha256(sdcomp.save(load(folder / "diffusers"), tmp_path / "a.safetensors")) == expected
    theirs.save_pretrained(tmp_path / "theirs")
    assert sha256(sdcomp.save(load(tmp_path / "theirs"), tmp_path / "a.safetensors")) == expected
    assert sha256(sdcomp.save(load(folder / "model.ckpt"), tmp_path / "a.safetensors")) == expected


# Runs in its own process: prints the peak of anonymous memory that loading adds.
MEASURE = """
import json, sys, threading, time, torch
import sdcomp.model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
sd = sdcomp.model.load(path, dtype=dtype)
done.set()
thread.join()
parts = (sd.unet, sd.encoder, sd.decoder, sd.text_encoder)
size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
print(json.dumps([max(peak, anonymous()) - before, size]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.safetensors", "float32"),
        ("model.safetensors", "float16"),
        ("half.safetensors", "float32"),
        ("model.ckpt", "float32"),
        ("diffusers", "float32"),
        ("diffusers", "bfloat16"),
    ],
)
def test_loading_takes_no_second_copy(folder, name, dtype):
    run = [sys.executable, "-c", MEASURE, str(folder / name), dtype]
    peak, size = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    print(f"\n{name} as {dtype}: {peak / size:.2f} x {size / 1e9:.2f} GB")
    assert size == PARAMETERS * (4 if dtype == "float32" else 2)
    assert peak <= 1.15 * size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_an_image_of_512_pixels_takes_less_than_10_gb(folder):
    code = (
        "import sys, sdcomp; sd = sdcomp.load(sys.argv[1]); "
        "images = sd.generate('a horse', steps=1); assert images.shape == (1, 3, 512, 512); "
        # Not ru_maxrss, which starts at the memory of the parent process.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = [sys.executable, "-c", code, str(folder / "model.safetensors")]
    peak = 1024 * int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    print(f"\n512x512: {peak / 1e9:.2f} GB")
    assert peak < 10e9
