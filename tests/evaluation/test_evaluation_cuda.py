"""Judges and measurements on a GPU: offloaded models, half-precision kernels, peak rates."""

import pytest
import torch

import sdcomp
from sdcomp.evaluation import Clip, Prompts, layer_profile, machine_peaks, macs, noise_mse, scores

pytestmark = pytest.mark.cuda

PROMPTS = ["a small red star on a navy background", "a large striped blue circle above a small green square"]
SETTINGS = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2}


@pytest.fixture(scope="module")
def plain():
    return sdcomp.load("data/tiny")


@pytest.mark.parametrize("where", ["on the device", "offloaded"])
def test_noise_errors_agree_with_the_cpu(plain, where):
    _, trace = plain.generate(PROMPTS, trace=True, **SETTINGS)
    with torch.no_grad():
        noisy = sdcomp.load("data/tiny").unet
        noisy.out[2].weight.add_(0.01)
    asked = {"guidance_scale": 3.0, "batch_size": 2}
    wanted = noise_mse(plain, noisy, PROMPTS, trace, **asked)
    if where == "offloaded":
        sd, unet = sdcomp.load("data/tiny").offload("cuda"), noisy
    else:
        sd, unet = sdcomp.load("data/tiny", device="cuda"), noisy.cuda()
    found = noise_mse(sd, unet, PROMPTS, trace, **asked)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-6)
    assert noise_mse(sd, sd.unet, PROMPTS, trace, **asked).max() < wanted.min()


@pytest.mark.parametrize("where", ["on the device", "offloaded"])
def test_images_are_judged_as_on_a_cpu(plain, where):
    images = plain.generate(PROMPTS, **SETTINGS)
    sd = sdcomp.load("data/tiny").offload("cuda") if where == "offloaded" else plain
    sd = sdcomp.load("data/tiny", device="cuda") if where == "on the device" else sd
    found, wanted = Clip.of(sd).embed_images(images), Clip.of(plain).embed_images(images)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())
    of_the_device = scores(sd, images, Prompts(PROMPTS))["CLIP score"]
    of_the_cpu = scores(plain, images, Prompts(PROMPTS))["CLIP score"]
    torch.testing.assert_close(of_the_device, of_the_cpu, rtol=0, atol=0.1)
    # CLIP shares the text encoder, which must be back on its device after a generation.
    sd.generate(PROMPTS[:1], **SETTINGS)
    assert torch.equal(Clip.of(sd).embed_texts(PROMPTS), Clip.of(sd).embed_texts(PROMPTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_attention_kernel_is_counted(plain, dtype):
    inputs = torch.randn(2, 4, 16, 16), 500, torch.randn(2, 24, 128)
    sd = sdcomp.load("data/tiny", device="cuda", dtype=dtype)
    placed = [part.to("cuda", dtype) if isinstance(part, torch.Tensor) else part for part in inputs]
    assert macs(sd.unet, *placed) == macs(plain.unet, *inputs)


def test_a_profile_waits_once_for_each_call(monkeypatch):
    sd = sdcomp.load("data/tiny", device="cuda")
    inputs = torch.randn(2, 4, 16, 16, device="cuda"), 500, torch.randn(2, 24, 128, device="cuda")
    inside, waits = [False], []
    synchronize, forward = torch.cuda.synchronize, sd.unet.forward

    def watched(*args):
        inside[0] = True
        try:
            return forward(*args)
        finally:
            inside[0] = False

    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda *args: (waits.append(inside[0]), synchronize(*args))
    )
    monkeypatch.setattr(sd.unet, "forward", watched)
    table = layer_profile(sd.unet, *inputs, repeats=2)
    assert waits and not any(waits)
    assert (table.seconds[table.kind.str.startswith("convolution")] > 0).all()


def test_a_gpu_has_peaks():
    peaks = machine_peaks(repeats=2, n=2048, device="cuda")
    assert set(peaks) == {"fp32", "bf16", "fp16", "memory"}
    # PyTorch's slowest GPU has 100 GB/s. Without waiting for the device, rates would be far above 1e7.
    assert 50 < peaks["memory"] < 1e5 and 500 < peaks["fp32"] < peaks["fp16"] < 1e7
